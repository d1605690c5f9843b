"""Whether OpenStack Swift does what our storage relies upon."""

from s3_contract import *  # noqa: F403
