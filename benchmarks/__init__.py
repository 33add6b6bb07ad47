"""One script per question; results are JSON lines with hardware and versions."""
