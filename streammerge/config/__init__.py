"""The export configuration: LLaMA-Factory's YAML keys and this project's, loaded and validated."""

from streammerge.config.load import load_config, parse_config
from streammerge.config.model import ExportConfig, FormatName

__all__ = ["ExportConfig", "FormatName", "load_config", "parse_config"]
