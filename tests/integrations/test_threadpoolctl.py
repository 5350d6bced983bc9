"""threadpoolctl lists the library's thread pool and limits it."""

from __future__ import annotations

import pytest
from helpers import run_python

LIMITS = """
{first}
import numpy as np, qkv_fast
x = np.ones((1, 2, 9, 8), np.float32)
qkv_fast.scaled_dot_product_attention(x, x, x)
{then}
import threadpoolctl
before = qkv_fast.get_num_threads()
ours = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "qkv_fast"]
with threadpoolctl.threadpool_limits(3):
    within = qkv_fast.get_num_threads()
with threadpoolctl.threadpool_limits(5, user_api="qkv_fast"):
    ours_alone = qkv_fast.get_num_threads()
print(len(ours), ours[0]["num_threads"] == before, ours[0]["version"] == qkv_fast.__version__,
      within, ours_alone, qkv_fast.get_num_threads() == before)
"""
REGISTER = "from qkv_fast.integrations.threadpoolctl import register; register(); register()"


@pytest.mark.parametrize(
    ("first", "then"), [("import threadpoolctl", ""), ("", REGISTER)], ids=["before", "after"]
)
def test_threadpoolctl_sees_and_limits_the_pool(native, first, then):
    pytest.importorskip("threadpoolctl")
    done = run_python(LIMITS.format(first=first, then=then), OMP_NUM_THREADS="2")
    assert done.stdout.split() == ["1", "True", "True", "3", "5", "True"], done.stderr
