"""What `kvcached doctor` says of vLLM."""

from kvcached_patches import ENGINES

findings = ENGINES["vllm"].doctor_findings
