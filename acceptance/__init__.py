"""The tests of S3 servers once more, on another one."""

import pytest

pytest.register_assert_rewrite("test_s3_server")
