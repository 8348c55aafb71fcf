"""One URL for many models on a machine: it starts, adopts and stops engines, orders and places.

Memory moves below it, in the engines: an idle model yields by pressure and wakes by request.
"""
