"""Add the facts of runner.machine(), such as the device, to pytest-benchmark's machine info."""

from tfkern.bench import runner


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(runner.machine())
