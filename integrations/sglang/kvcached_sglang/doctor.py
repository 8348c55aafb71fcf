"""What `kvcached doctor` says of SGLang."""

from kvcached_patches import ENGINES

findings = ENGINES["sglang"].doctor_findings
