"""The gateway seen and steered from outside: its socket, its metrics, `kvcached doctor`."""
