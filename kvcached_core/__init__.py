"""kvcached: elastic KV caches for LLM serving.

The core knows bytes, pages and processes. It imports no engine, and torch only where a backend
makes a tensor view.
"""

__version__ = "0.2.0"
