"""What a setting costs in quality, and what it saves: perplexity, distance to exact mode, multiple choice.

`Plan` says what is measured, `run` measures it, `table` shows it; `statistics` has the figures by themselves.
"""

from .compare import Plan, run
from .settings import Setting, parse_setting

__all__ = ["Plan", "Setting", "parse_setting", "run"]
