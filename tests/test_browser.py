"""The episode browser in a real JupyterLab in a real Chromium: run its page, see the widget, move a slider, see another step.

Opt-in, since it needs Chromium: `python -m pytest -m browser`. Chromium is driven by its own DevTools protocol.
"""
import base64, json, os, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import websocket

nbs = Path(__file__).resolve().parent.parent/'nbs'


def until(ask, seconds, what):
    "What `ask` returns, once it is true"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := ask(): return found
        except (OSError, KeyError): pass    # not up yet
        time.sleep(.3)
    pytest.fail(f'{what}: expected within {seconds} s, found nothing')


@contextmanager
def running(cmd, **kw):
    p = subprocess.Popen(cmd, **kw)
    try: yield p
    finally:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill()


@contextmanager
def lab(folder):
    "JupyterLab on a folder, with no configuration of the user's; yields its address"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, **{f'JUPYTER_{k}_DIR': str(folder/'.jupyter'/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}}
    env.pop('IN_TEST', None)    # the widget itself, not its picture
    words = ['--no-browser', '--allow-root', f'--port={port}', '--IdentityProvider.token=', f'--ServerApp.root_dir={folder}', '--expose-app-in-browser',
             '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with running([sys.executable, '-m', 'jupyterlab', *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        url = f'http://127.0.0.1:{port}'
        until(lambda: urllib.request.urlopen(f'{url}/api/status').status == 200, 120, 'JupyterLab')
        yield url


class Page:
    "A page of Chromium, by the DevTools protocol"
    def __init__(self, address): self.ws, self.n = websocket.create_connection(address, timeout=60, suppress_origin=True), 0
    def send(self, method, **params):
        self.n += 1
        self.ws.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (m := json.loads(self.ws.recv())).get('id') != self.n: pass    # events
        return m['result']
    def js(self, code):
        r = self.send('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in r, r
        return r['result'].get('value')
    def press(self, key): [self.send('Input.dispatchKeyEvent', type=t, key=key, code=key, windowsVirtualKeyCode=39) for t in ('keyDown', 'keyUp')]


@contextmanager
def chromium(folder, url):
    exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if exe is None: pytest.fail('chromium: expected on the PATH, found none; install it, or leave out -m browser')
    words = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--window-size=1400,1200', '--remote-debugging-port=0', f'--user-data-dir={folder}']
    with running([exe, *words, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        port = until(lambda: (folder/'DevToolsActivePort').read_text().split()[0], 60, 'Chromium')
        pages = lambda: [t for t in json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json')) if t['type'] == 'page']
        yield Page(until(pages, 30, 'a page')[0]['webSocketDebuggerUrl'])


@pytest.mark.browser
def test_the_widget_lives_in_jupyterlab(tmp_path):
    shutil.copy(nbs/'viz/02_browser.ipynb', tmp_path/'page.ipynb')
    widget, text = "document.querySelector('.jp-OutputArea .widget-vbox')", "document.querySelector('.jp-OutputArea .widget-html-content')?.textContent"
    with lab(tmp_path) as url, chromium(tmp_path/'.chromium', f'{url}/lab/tree/page.ipynb?reset') as page:
        until(lambda: page.js("!!window.jupyterapp && document.querySelectorAll('.jp-Notebook .jp-Cell').length > 5"), 120, 'the notebook')
        until(lambda: page.js("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"), 120, 'a kernel')
        page.js("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        until(lambda: page.js(f'!!{widget}'), 60, 'the widget')
        page.js(f'{widget}.scrollIntoView()')
        before = until(lambda: (t := page.js(text) or '') and 'episode 2' in t and t, 30, 'its text after the last cell')
        assert not page.js("[...document.querySelectorAll('.jp-OutputArea-output[data-mime-type*=error]')].map(e => e.textContent)")
        assert 'step 0 of' in before, before    # where the page's last cell left it
        picture = page.js(f"{widget}.querySelector('img').src")
        assert page.js(f"{widget}.querySelector('img').naturalWidth") > 300
        page.js(f"{widget}.querySelectorAll('.noUi-handle')[1].focus()")    # the slider of the step
        for k in range(3): page.press('ArrowRight')
        after = until(lambda: 'step 3 of' in (t := page.js(text) or '') and t, 30, 'step 3')
        until(lambda: page.js(f"{widget}.querySelector('img').src") != picture, 30, 'another picture')
        (tmp_path/'lab.png').write_bytes(base64.b64decode(page.send('Page.captureScreenshot')['data']))
        assert after.split(' · ')[0] == before.split(' · ')[0]
