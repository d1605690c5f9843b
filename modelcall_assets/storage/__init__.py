"""Files in and out: the only importer of fsspec. Inputs may be remote, outputs are local."""
