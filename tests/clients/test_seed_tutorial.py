"""The tutorial the project began with: its own programs run with only the base URL changed.

The tutorial is not ours to keep in the repository. Where its text lies beside the checkout, the
programs are taken from it, mended where the text was damaged on its way here (the first has lost its
line breaks, the last its end), and run.
"""

import ast
import re
import sys

import pytest

from harness import BAD_DAY, PATIENT, ROOT, run

TUTORIAL = ROOT.parent / "shared" / "seed-tutorial.txt"

pytestmark = pytest.mark.skipif(
    not TUTORIAL.is_file(),
    reason=f"the tutorial's text is not beside the checkout ({TUTORIAL}); it is not ours to ship",
)

# How each statement of the first program begins, in order, with the indentation it has lost.
FIRST_PROGRAM = [
    (0, "API_KEY ="),
    (0, "async def call_ai_api("),
    (4, '"""'),
    (4, "headers ="),
    (4, "payload ="),
    (4, "async with session.post("),
    (8, "result ="),
    (8, "if response.status"),
    (12, "raise "),
    (8, "return {"),
    (0, "async def main("),
    (4, '"""'),
    (4, "prompts = ["),
    (4, "async with aiohttp"),
    (8, "# "),
    (8, "tasks ="),
    (8, "results ="),
    (8, "for i, result"),
    (12, "if isinstance("),
    (16, "print("),
    (12, "else:"),
    (16, "print("),
    (0, "if __name__"),
    (4, "asyncio.run("),
]

# What the last program needs after the place where its text breaks off.
LAST_PROGRAM_END = """
                await asyncio.sleep(delay)
        return {"success": False, "error": last_error}

async def main():
    service = ResilientAIService(api_key="any")
    async with aiohttp.ClientSession() as session:
        return await asyncio.gather(*[service.call_with_retry(session, f"#{n}") for n in range(10)])

for result in asyncio.run(main()):
    print(result)
"""


def programs() -> list[str]:
    """A program begins at each `import asyncio` and reaches to the first prose after its last line."""
    text = TUTORIAL.read_text(encoding="utf-8")
    parts = ["import asyncio\n" + part for part in text.split("import asyncio\n")[1:]]
    assert len(parts) == 4, f"{len(parts)} programs in {TUTORIAL}"
    first, *complete, last = parts
    first = first.split("asyncio.run(main())")[0] + "asyncio.run(main())"
    imports, flattened = first.split("BASE_URL = ", 1)
    imports = "".join(line for line in imports.splitlines(keepends=True) if line.startswith(("import ", "from ")))
    complete = [re.split(r"(?<=asyncio\.run\()(demo_\w+\(\)\))", part) for part in complete]
    mended = [
        imports + with_line_breaks("BASE_URL = " + flattened),
        *("".join(part[:2]) for part in complete),
        last + LAST_PROGRAM_END,
    ]
    for program in mended:
        ast.parse(program)
    return mended


def with_line_breaks(flattened: str) -> str:
    lines, rest = [], flattened
    for indentation, beginning in FIRST_PROGRAM:
        # A docstring's beginning is its opening quotes; the next statement lies behind the closing ones.
        behind = rest.index('"""', 3) + 3 if rest.lstrip().startswith('"""') else 0
        at = rest.index(beginning, behind)
        lines.append(rest[:at].rstrip())
        rest = " " * indentation + rest[at:]
    return "\n".join([*lines, rest])


@pytest.mark.parametrize(
    ("number", "proof"),
    [
        (0, lambda output: output.count("성공:") == 5 and "실패" not in output),
        (1, lambda output: output.count("[고객 #") == 2),
        (2, lambda output: "20건 성공 / 0건 실패" in output),
        (3, lambda output: output.count("'success': True") == output.count("'attempts': 1,") == 10),
    ],
    ids=["gather", "customer service", "semaphore", "retries"],
)
def test_the_tutorials_own_program_runs_with_only_its_base_url_changed(
    number, proof, start_simulator, start_weir, tmp_path
):
    weir = start_weir(start_simulator(*BAD_DAY), PATIENT)
    original = programs()[number]
    program = original.replace("https://api.holysheep.ai/v1", weir.base_url).replace("YOUR_HOLYSHEEP_API_KEY", "any")
    assert program != original
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")

    done = run(sys.executable, file, base_url="unused")
    assert done.returncode == 0
    assert proof(done.stdout)
