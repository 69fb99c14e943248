"""The other backbones and optimizers learn, too (minutes; `-m slow`)."""

import pytest
import tiny

RESNET = {
    'model.name': 'resnet18', 'model.dim': 16, 'model.depth': 0,
    'model.num_heads': 0, 'model.small_images': True,
    'head.projector_layers': 2, 'head.predictor_out_bn': False,
    'objective.temperature': 1.0,
    'optimizer.name': 'lars', 'optimizer.lr_per_256': 1.0,
    'optimizer.weight_decay': 1e-6, 'schedule.epochs': 40.0,
    'schedule.warmup_epochs': 4.0,
}
CONV_STEM = {'model.patch_embed': 'conv', 'schedule.epochs': 60.0}


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize(
    'overrides', [RESNET, CONV_STEM], ids=['LARS ResNet', 'AdamW conv stem']
)
def test_digits_are_told_apart_better_than_at_random(
    tmp_path, overrides, seed
):
  def knn(name, **more):
    flags = [f'--config.{k}={v}' for k, v in (overrides | more).items()]
    code, _, err = tiny.run(
        'train', '--config=configs/digits.py', f'--config.seed={seed}',
        f'--workdir={tmp_path / name}', *flags,
    )
    assert code == 0, err
    rows = tiny.metrics(tmp_path / name)
    return [r['knn/top1'] for r in rows if 'knn/top1' in r][-1]

  # The random network, once its BatchNorms have seen some batches.
  random = knn('random', **{
      'optimizer.lr_per_256': 0.0, 'schedule.epochs': 8.0,
      'schedule.warmup_epochs': 0.0,
  })
  # One standard error of such a difference is about 0.02.
  assert knn('trained') > random + 0.05
