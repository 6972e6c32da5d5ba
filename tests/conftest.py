"Under pytest every public function's shapes and types are checked as it is called; in training nothing is"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('WANDB_MODE', 'disabled')

from jaxtyping import install_import_hook

install_import_hook('vla_nb', 'beartype.beartype')
