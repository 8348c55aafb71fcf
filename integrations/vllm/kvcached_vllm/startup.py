"""How vLLM starts: what is the same for every engine is the core's."""

from kvcached_core.engine.start import Startup
from kvcached_patches import ENGINES

startup = Startup(ENGINES["vllm"])
