#!/usr/bin/env bash
# Measures the machine at hand, for docs/performance.md: at most 5 minutes on a
# machine with an accelerator, one process after another.
#
#   bash launch/accelerator_check.sh OUT [--long]
#
# OUT is a new folder. Each result is written there as soon as it is available:
# its row to OUT/rows.jsonl, what it printed to OUT/NAME.log, a profile of
# ViT-B/16 to OUT/profile; the table comes last. A measurement that fails, or
# for which no time is left, gets a row as well. --long adds ViT-L/16, PyTorch
# for all networks, and 15 minutes. PyTorch is included only if it is installed.
#
# PYTHON names an interpreter that already has the packages; without it, .venv
# is created. TINY=1 uses small networks, and allows an hour, to try this script
# on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ -e "$1" ] || [ "${2:---long}" != --long ]
then
  echo "error: usage: bash launch/accelerator_check.sh NEW_FOLDER [--long]" >&2
  exit 2
fi
out=$1
long=${2:-}
if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
else
  source launch/venv.sh
  use_venv .
fi
mkdir -p "$out"

row() {  # NAME ARGUMENTS...: one command of `benchmark`, and its row.
  local name=$1 start=$SECONDS left=$((end - SECONDS)) code=0
  shift
  echo "$name ..." >&2
  timeout -k 10 "$((left > 1 ? left : 1))" "$python" -m mocov3_jax.benchmark "$@" \
    > "$out/$name.json" 2> "$out/$name.log" || code=$?
  "$python" - "$name" "$code" "$((SECONDS - start))" "$out" <<'END'
import json, pathlib, sys
name, code, seconds, out = sys.argv[1:]
text = (pathlib.Path(out) / f'{name}.json').read_text().splitlines()
row = {'name': name, 'code': int(code), 'seconds': int(seconds)}
if row['code'] == 0 and text:
  row |= json.loads(text[-1])
with open(f'{out}/rows.jsonl', 'a') as file:
  file.write(json.dumps(row) + '\n')
END
}

vit_b=(--config=configs/imagenet/vit_b16.py --config.batch_size=256)
vit_s=(--config=configs/imagenet/vit_s16.py --config.batch_size=256
       --config.model.dtype=bfloat16)
vit_l=(--config=configs/imagenet/vit_l16.py --config.batch_size=128)
resnet=(--config=configs/imagenet/resnet50.py --config.batch_size=256
        --config.model.dtype=bfloat16)
turns=(--rounds=3 --steps=5)
images=640
end=$((SECONDS + 290))
if [ "$long" = --long ]; then end=$((end + 900)); fi
if [ -n "${TINY:-}" ]; then
  small=(--config.batch_size=4 --config.data.image_size=32
         --config.head.hidden_dim=64)
  for network in vit_b vit_s vit_l; do
    declare -n flags=$network
    flags+=("${small[@]}" --config.model.dim=48 --config.model.depth=2
            --config.model.num_heads=2)
  done
  unset -n flags
  resnet+=("${small[@]}" --config.model.dim=8)
  turns=(--rounds=1 --steps=1)
  images=32
  end=$((SECONDS + 3600))
fi
against=none
if "$python" -c 'import torch, timm' 2>/dev/null; then against=compiled; fi
others=none
if [ "$long" = --long ]; then others=$against; fi

"$python" - "$out/photos" "$images" <<'END'
import pathlib, sys
import numpy as np
from PIL import Image
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
rng = np.random.default_rng(0)
for i in range(min(int(sys.argv[2]), 160)):  # As large as ImageNet's mean.
  rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
  rough.resize((500, 375), Image.Resampling.BICUBIC).save(
      folder / f'{i}.jpg', quality=90)
END
row losses losses --config=configs/digits.py --steps=10
row attention attention "${vit_b[@]}" "${turns[@]}"
row vit_b step "${vit_b[@]}" "${turns[@]}" --against=$against \
  --profile="$out/profile"
row input input --config=configs/folder.py:"$out/photos" \
  --config.batch_size=16 --images="$images" --rounds=1
row vit_s step "${vit_s[@]}" "${turns[@]}" --against=$others
row resnet50 step "${resnet[@]}" "${turns[@]}" --against=$others
if [ "$long" = --long ]; then
  row vit_l step "${vit_l[@]}" "${turns[@]}" --against=$others
fi
rm -r "$out/photos"

"$python" - "$out/rows.jsonl" <<'END'
import json, sys
def about(row):
  if row['code'] == 124:
    return f'not finished in time; see {row["name"]}.log'
  if row['code']:
    return f'failed with code {row["code"]}; see {row["name"]}.log'
  if row['name'] == 'losses':
    return f'{row["device"]}: largest difference {row["difference"]:.1e}'
  if row['name'] == 'attention':
    return ', '.join(
        f'{k} {v["ms"]:.2f} ms' if 'ms' in v else f'{k} failed'
        for k, v in row.items() if isinstance(v, dict)
    ) + f'; auto takes {row["chosen"]}'
  if 'jax' in row:
    mfu = row['jax']['mfu_peak']
    return (
        f'{row["jax"]["images_per_second"]:.1f} img/s'
        + ('' if mfu is None else f', MFU {mfu:.1%}')
        + (f', {row["ratio"]:.2f} x PyTorch' if 'ratio' in row else '')
    )
  return json.dumps({k: v for k, v in row.items()
                     if k not in ('name', 'code', 'seconds')})[:200]
for row in map(json.loads, open(sys.argv[1])):
  print(f'{row["name"]:10} {row["seconds"]:4d} s  {about(row)}')
END
