"""Tars that are read once from their start, by the webdataset library: `data.order: stream`."""
