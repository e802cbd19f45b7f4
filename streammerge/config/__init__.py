"""The export configuration: LLaMA-Factory's YAML keys and this project's, loaded and validated."""

from streammerge.config.load import load_config, parse_config
from streammerge.config.model import ExportConfig

__all__ = ["ExportConfig", "load_config", "parse_config"]
