"Under pytest every public function's shapes and types are checked as it is called; in training nothing is"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('WANDB_MODE', 'disabled')

from jaxtyping import install_import_hook

install_import_hook('vla_nb', 'beartype.beartype')


def pytest_collection_modifyitems(config, items):
    "Tests that need a browser run only when they are asked for, with `-m browser`"
    if 'browser' in (config.option.markexpr or ''): return
    left = [i for i in items if i.get_closest_marker('browser')]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [i for i in items if i not in left]
