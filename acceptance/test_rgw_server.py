"""Whether Ceph's gateway does what our storage relies upon: the ordinary tests of it, collected
here once more."""

from test_s3_server import *  # noqa: F403
