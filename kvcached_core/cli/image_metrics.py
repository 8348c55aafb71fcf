"""Prometheus metrics of images of weights on a disk, read from its folder at each scrape."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvcached_core.cli.images import disk_images

PREFIX = "kvcached_weights_disk_"
OUT, BACK = "out", "back"


class ImageCollector:
    """Reads the folder of the disk that the settings name whenever Prometheus asks."""

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; none where no disk is set."""
        found = disk_images()
        if found is None:
            return
        moves = found.moves
        yield GaugeMetricFamily(PREFIX + "bytes", "Images on the disk.", found.num_bytes)
        yield GaugeMetricFamily(PREFIX + "images", "How many they are.", len(found.holders))
        counters = {
            "moves": (
                "Images that went out to the disk, and came back.",
                moves.num_written,
                moves.num_read,
            ),
            "moved_bytes": ("Their bytes.", moves.written_bytes, moves.read_bytes),
            "move_seconds": ("What it took.", moves.write_seconds, moves.read_seconds),
        }
        for name, (text, out, back) in counters.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=["direction"])
            family.add_metric([OUT], out)
            family.add_metric([BACK], back)
            yield family
        yield CounterMetricFamily(
            PREFIX + "spoiled", "Images that came back with other bytes.", moves.num_spoiled
        )
