"""A notebook-first laboratory of vision-language-action policies"""

from importlib.metadata import version

__version__ = version("vla_nb")
