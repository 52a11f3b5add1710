"""The embedded default: everything from images to a report, on a CPU and without a download."""
