"""GPU facts beside pytest-benchmark's own."""

from tfkern.bench import runner


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(runner.machine())
