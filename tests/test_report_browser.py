"""The report's page in a browser: what a reader sees, and can do by keyboard.

Needs Chromium and its driver on the PATH (Debian: chromium-driver).
"""

import collections
import json
import shutil
import time

import fake_runs
import pytest
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from mocov3_jax.reports import data
from mocov3_jax.reports import page as report_page
from mocov3_jax.runs import history

CHROME, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROME and DRIVER), reason='chromium and chromedriver are absent'
    ),
]
FLAGS = (
    '--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run',
    '--disable-background-networking', '--disable-component-update',
    '--disable-sync', '--window-size=1280,900',
)
LONG = 'a_name_' + 60 * 'x'
ODD = '<b>&"\' %{y}'


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  root = tmp_path_factory.mktemp('browser')
  sweep = fake_runs.sweep(root / 'sweep')
  for name in 'lr0.001_frozen_1', 'lr0.001_learned_1':
    shutil.rmtree(sweep / name)  # A legend has room for 12.
  lines = fake_runs.rows(100)
  for name in ODD, LONG:
    fake_runs.write(sweep / name, lines, **{
        'optimizer.lr_per_256': 0.01, 'data.source': 'folder:/' + 90 * 'y',
    })
  made = data.make(map(history.read, history.find([str(sweep)])))
  path = root / 'report.html'
  path.write_text(report_page.page(made, '2026-01-01'))
  return path.as_uri()


@pytest.fixture(scope='module')
def started(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = CHROME
  profile = tmp_path_factory.mktemp('profile')
  for flag in (*FLAGS, f'--user-data-dir={profile}'):
    options.add_argument(flag)
  options.set_capability(
      'goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'}
  )
  driver = webdriver.Chrome(
      options=options, service=webdriver.ChromeService(DRIVER)
  )
  yield driver
  driver.quit()


@pytest.fixture
def browser(started, page):
  """The page, all charts drawn; nothing may be loaded or complained about."""
  size(started, 1280)
  started.get(page)
  WebDriverWait(started, 60).until(
      lambda d: d.execute_script(
          'return document.documentElement.dataset.ready'
      )
  )
  yield started
  assert started.get_log('browser') == []
  for entry in started.get_log('performance'):
    message = json.loads(entry['message'])['message']
    if message['method'] == 'Network.requestWillBeSent':
      url = message['params']['request']['url']
      assert not url.startswith(('http', 'ws', 'ftp')), url


def size(browser, width, scheme='light'):
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
      'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False,
  })
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {
      'features': [{'name': 'prefers-color-scheme', 'value': scheme}],
  })


def plots(browser):
  return browser.find_elements(By.CLASS_NAME, 'plot')


def shown(browser, plot):
  """The names of the curves to be seen, and the runs of each."""
  return browser.execute_script(
      'return arguments[0].data.filter(t => t.visible === true)'
      '.map(t => [t.name, t.meta.runs])', plot
  )


def live(browser):
  return browser.find_element(By.ID, 'live').get_property('textContent')


def colors(browser):
  return browser.execute_script(
      'return [getComputedStyle(document.body).backgroundColor,'
      'document.querySelector(".plot").layout.font.color]'
  )


def test_all_charts_are_drawn(browser):
  charts = plots(browser)
  assert len(charts) == 7
  for chart in charts:
    assert chart.find_elements(By.CSS_SELECTOR, '.scatterlayer .trace')
    box = chart.find_element(By.CSS_SELECTOR, '.main-svg').rect
    assert box['width'] > 300 and box['height'] > 200


def test_every_curve_is_reached_by_keyboard_and_said(browser):
  for chart in plots(browser):
    names = [name for name, _ in shown(browser, chart)]
    assert names
    chart.send_keys(Keys.SHIFT)  # Gives it the focus, and does no more.
    assert f'{len(names)} curves' in live(browser)
    heard = []
    chart.send_keys(Keys.ARROW_RIGHT)
    for name in names:
      first = live(browser)
      assert first.startswith(f'{name}: '), (name, first)
      assert chart.find_elements(By.CSS_SELECTOR, '.hoverlayer .hovertext')
      chart.send_keys(Keys.END)
      heard.append(live(browser))
      chart.send_keys(Keys.HOME)
      chart.send_keys(Keys.ARROW_DOWN)
    assert live(browser).startswith(f'{names[0]}: ')  # Round again.
    assert all(any(c.isdigit() for c in text) for text in heard)
    chart.send_keys(Keys.ESCAPE)
    assert live(browser) == ''


def test_the_arrows_move_along_a_curve_by_its_points(browser):
  chart = browser.find_element(By.ID, 'plot-knn')
  chart.send_keys(Keys.ARROW_RIGHT)
  assert 'step 0, kNN accuracy ' in live(browser) and ' %' in live(browser)
  chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
  assert 'step 20,' in live(browser)
  chart.send_keys(Keys.ARROW_LEFT)
  assert 'step 10,' in live(browser)
  chart.send_keys(Keys.END)
  before = live(browser)
  chart.send_keys(Keys.ARROW_RIGHT)
  assert live(browser) == before


def test_zooming_the_steps_of_one_chart_zooms_the_others(browser):
  chart = browser.find_element(By.ID, 'plot-knn')
  span = lambda: browser.execute_script(
      'const r = document.getElementById("plot-loss").layout.xaxis.range;'
      'return r[1] - r[0]'
  )
  before = span()
  chart.send_keys('+')
  WebDriverWait(browser, 10).until(lambda _: span() < 0.7 * before)
  time.sleep(0.3)
  chart.send_keys('0')
  WebDriverWait(browser, 10).until(lambda _: span() > 0.9 * before)


def test_a_run_that_is_unticked_leaves_all_charts(browser):
  name = 'lr0.001_learned_0'
  number = [
      n for n, b in enumerate(
          browser.find_elements(By.CSS_SELECTOR, 'tbody label.run')
      ) if b.text == name
  ][0]
  box = browser.find_element(By.ID, f'run-{number}')
  select = Select(browser.find_element(By.ID, 'one-run'))
  select.select_by_value(str(number))
  for chart in plots(browser):
    assert any(number in those for _, those in shown(browser, chart))
  box.send_keys(Keys.SPACE)
  assert not box.is_selected()
  for chart in plots(browser):
    for _, those in shown(browser, chart):
      assert those != [number]
  assert select.first_selected_option.get_property('value') != str(number)
  browser.find_element(By.CSS_SELECTOR, 'button[data-all="0"]').click()
  assert not any(shown(browser, chart) for chart in plots(browser))
  browser.find_element(By.CSS_SELECTOR, 'button[data-all="1"]').click()
  assert all(shown(browser, chart) for chart in plots(browser))


def test_epochs_replace_steps_and_back(browser):
  unit = Select(browser.find_element(By.ID, 'unit'))
  ends = lambda: browser.execute_script(
      'const p = document.getElementById("plot-knn");'
      'return [p.data[0].x.at(-1), p.layout.xaxis.title.text]'
  )
  end = ends()
  unit.select_by_value('epoch')
  # 1437 images make 5 batches of 256.
  assert ends() == [end[0] / 5, 'epoch'] and end[1] == 'step'
  chart = browser.find_element(By.ID, 'plot-knn')
  chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
  assert 'epoch 2, kNN accuracy' in live(browser)
  unit.select_by_value('step')
  assert ends() == end


def test_the_theme_follows_the_system_and_its_button(browser):
  light = colors(browser)
  browser.find_element(By.ID, 'theme').send_keys(Keys.ENTER)
  dark = colors(browser)
  assert dark[0] != light[0] and dark[1] != light[1]
  browser.find_element(By.ID, 'theme').click()
  assert colors(browser) == light
  size(browser, 1280, 'dark')
  WebDriverWait(browser, 10).until(lambda _: colors(browser) == dark)


@pytest.mark.parametrize('width', [360, 768, 1280])
def test_the_page_does_not_scroll_sideways(browser, width):
  size(browser, width)
  time.sleep(0.5)
  wide, room = browser.execute_script(
      'const d = document.documentElement;'
      'return [d.scrollWidth, d.clientWidth]'
  )
  assert wide <= room <= width


def test_names_are_shown_as_they_are(browser):
  labels = browser.find_elements(By.CSS_SELECTOR, 'tbody label.run')
  number = [label.text for label in labels].index(ODD)
  chart = browser.find_element(By.ID, 'plot-knn')
  place = [those for _, those in shown(browser, chart)].index([number])
  chart.send_keys(Keys.ARROW_RIGHT, *[Keys.ARROW_DOWN] * place)
  assert live(browser).startswith(ODD)
  hover = chart.find_element(By.CSS_SELECTOR, '.hoverlayer .hovertext')
  assert hover.get_property('textContent').startswith(ODD)


def test_what_can_be_focused_is_seen_to_be(browser):
  body = browser.find_element(By.TAG_NAME, 'body')
  body.send_keys(Keys.TAB)
  reached = []
  for _ in range(200):
    item = browser.switch_to.active_element
    if item.tag_name == 'body':
      break
    reached.append(item.get_property('id') or item.tag_name)
    assert item.value_of_css_property('outline-style') == 'solid', reached
    item.send_keys(Keys.TAB)
  ids = {chart.get_property('id') for chart in plots(browser)}
  assert ids | {'theme', 'run-0', 'unit', 'one-run', 'summary'} <= set(reached)


# Without a slash, since folders have such names, and without a comma, at which
# the page breaks names.
TAGS = '<img src=x onerror=alert(1)><a href=x>%{y}<script>alert(2)'


def planted(root, text):
  """Two runs in which every text that a run may choose is this one."""
  for number in range(2):
    lines = fake_runs.rows(100, seed=number, dip_at=(40,), spike_at=(30,))
    for row in lines:
      if 'train/loss' in row:
        row[f'grad_max/{text}'] = 1.0 + (row['step'] == 30) * 50
    path = fake_runs.write(
        root / f'{number}{text}', lines, seed=number,
        data={'images': 1437, 'classes': 10, text: text},
        environment={'jax': text, 'device': text, text: text},
        evaluations=[(text, 0.5)],
        **{'data.source': f'folder:{number}{text}', 'model.name': text},
    )
    c = json.loads((path / 'config.json').read_text())
    c[text] = {text: f'{number}{text}'}
    (path / 'config.json').write_text(json.dumps(c))
  made = data.make(map(history.read, history.find([str(root)])))
  file = root / 'page.html'
  file.write_text(report_page.page(made, '2026-01-01'))
  return file.as_uri()


def elements(browser):
  return collections.Counter(browser.execute_script(
      'return [...document.querySelectorAll("*")].map(e => e.tagName)'
  ))


def test_texts_of_others_make_no_element_no_link_and_no_request(
    browser, tmp_path
):
  found = {}
  for name, text in ('plain', 'plain'), ('hostile', TAGS):
    browser.get(planted(tmp_path / name, text))
    WebDriverWait(browser, 60).until(lambda d: d.execute_script(
        'return document.documentElement.dataset.ready'
    ))
    with pytest.raises(NoAlertPresentException):
      browser.switch_to.alert.accept()
    found[name] = elements(browser)
    # Whatever is shown of a point is text as well.
    for chart in plots(browser):
      chart.send_keys(Keys.ARROW_RIGHT)
      chart.send_keys(Keys.ARROW_UP)
    assert not browser.find_elements(By.CSS_SELECTOR, 'img, iframe, a[href=x]')
  links = {n: c['A'] for n, c in found.items()}
  assert found['hostile'] == found['plain'], links
