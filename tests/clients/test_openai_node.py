"""The OpenAI SDK for Node: its tests stand in node/client.test.js and run in Node's own test runner."""

from pathlib import Path

from harness import QUICK, run, tool

NODE = Path(__file__).parent / "node"


def test_the_node_sdk_calls_streams_and_aborts(start_simulator, start_weir):
    assert (NODE / "node_modules" / "openai").is_dir(), "openai for Node is missing: `tests/run clients` installs it"
    quick = start_weir(start_simulator(*QUICK))
    slow_simulator = start_simulator("--first-token", "5ms", "--per-token", "60s")
    slow = start_weir(slow_simulator, "[limits]\nconcurrency = 1")

    done = run(
        tool("node"),
        "--test",
        "--test-reporter=spec",
        NODE / "client.test.js",
        base_url=quick.base_url,
        SLOW_BASE_URL=slow.base_url,
        SLOW_METRICS_URL=f"{slow.admin_url}/metrics",
    )
    assert done.returncode == 0
    slow.wait_until_idle()
    slow_simulator.wait_until_idle()
    assert slow.metric("weir_client_disconnects_total", phase="stream") == 2
