"""What control groups leave of a host's memory, from files as the kernel has them."""

import pytest

from gearshift.engine.cluster.memory import free_memory, host_memory


@pytest.mark.parametrize(
    "own, file",
    (
        ("0::/slurm/job_7/step_0", "slurm/job_7/memory.max"),  # of an outer group, version 2
        ("0::/", "memory.max"),  # a container's own
        ("4:cpu,cpuacct:/\n9:memory:/slurm/job_7", "memory/slurm/job_7/memory.limit_in_bytes"),
    ),
)
def test_memory_is_what_the_control_groups_leave(tmp_path, own, file):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{own}\n")
    assert host_memory(tmp_path) == host_memory(tmp_path / "none")
    limit = tmp_path / "sys/fs/cgroup" / file
    limit.parent.mkdir(parents=True)
    limit.write_text("1000000\n")
    assert host_memory(tmp_path) == free_memory(tmp_path) == 1e6
    limit.write_text("max\n")
    assert host_memory(tmp_path) > 1e6 < free_memory(tmp_path)


@pytest.mark.parametrize(
    "limit, used, kind", (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_"))
)
def test_what_is_free_counts_no_pages_of_files(tmp_path, limit, used, kind):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / f"memory.{limit}").write_text("1000000\n")
    (group / f"memory.{used}").write_text("700000\n")
    stat = f"anon 400000\n{kind}active_file 100000\n{kind}inactive_file 200000\n"
    (group / "memory.stat").write_text(stat)
    assert free_memory(tmp_path) == 600_000
    (group / f"memory.{used}").write_text("250000\n")  # the kernel's sums lag behind one another
    assert free_memory(tmp_path) == 1_000_000
