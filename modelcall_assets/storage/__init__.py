"""Files in and out, on disks and in stores: the only importer of fsspec."""
