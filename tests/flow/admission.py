"""Cases of admission: quotas that weir is told, shares, and what the refused are told."""

import asyncio
import time

from client import Answer, Client
from scene import FIGURES, Batch, Row, at_times, client, percentile, seconds, stage

# So that only quotas take time.
QUICK = "--first-token 50ms --spread 0 --per-token 0s"
UNLIMITED = "concurrency = 10000"


def a_known_quota() -> list[Row]:
    """500 requests at once, at 50 a second: beside an oracle that sends each straight to the gateway when it is due."""
    count, rate, burst = 500, 50, 5
    gateway = f"{QUICK} --requests {rate}/s --requests-burst {burst}"
    config = f"""
        [limits]
        {UNLIMITED}
        requests = {{ rate = "{rate}/s", burst = {burst} }}"""
    with stage(gateway, config) as direct:
        # Behind the burst a few milliseconds late, so that it is refused nothing for its own slow start.
        due = [0.0] * burst + [(n + 1) / rate + 0.005 for n in range(count - burst)]
        best = asyncio.run(batch(due, direct.simulator.base_url))
    with stage(gateway, config) as through:
        ours = asyncio.run(batch([0] * count, through.weir.base_url))
        refused = through.refused_upstream()
    return [
        Row("time of the oracle", seconds(best.took)),
        Row("time through weir, over the oracle's", f"{ours.took / best.took:.3f}", "1.03"),
        Row("refused by the gateway, for each request", f"{refused / count:.4f}", "0.005"),
        Row("errors seen by the client", str(ours.errors), "0"),
        Row("errors seen by the oracle", str(best.errors)),
    ]


def a_known_token_quota() -> list[Row]:
    """100 requests at once, before a bucket of tokens that holds ten of them; each costs what weir estimates."""
    output, prompt = 200, "word " * 640
    # weir takes the whole body for prompt, at four bytes a token, until answers have told it more.
    cost, rate = 1030, 20
    tokens = f'{{ rate = "{cost * rate}/s", burst = {10 * cost} }}'
    gateway = f"{QUICK} --output {output}..{output} --tokens {cost * rate}/s --tokens-burst {10 * cost}"
    config = f"""
        [limits]
        {UNLIMITED}
        tokens = {tokens}"""
    with stage(gateway, config) as through:
        all_of_it = asyncio.run(batch([0] * 100, through.weir.base_url, prompt=prompt, max_tokens=output))
        refused = through.refused_upstream()
    answers = all_of_it.answers
    ends = sorted(answer.ended - all_of_it.begun for answer in answers)
    # The gateway charges the prompt's text and max_tokens.
    charged = len(prompt) // 4 + output
    return [
        Row("not queued", str(sum(answer.queued < 0.01 for answer in answers)), "10"),
        Row("time of the tenth", seconds(ends[9])),
        Row("time of the last", seconds(ends[-1]), seconds(0.05 + (100 * charged - 10 * cost) / (cost * rate))),
        Row("refused by the gateway", str(refused), "0"),
        Row("errors seen by the client", str(all_of_it.errors), "0"),
    ]


def a_flood_beside_a_batch() -> list[Row]:
    """Ten requests every three seconds at ten a second; then the same beside a client that sends 100 times its share."""
    rate, share = 10, 5
    config = f"""
        [limits]
        {UNLIMITED}
        requests = {{ rate = "{rate}/s", burst = 1 }}
        [queue]
        max_wait = "10s"
        [clients.flood]
        key = "flood"
        [clients.batch]
        key = "batch" """
    # Ten seconds of a flood before the first batch would change nothing; two are enough to fill what it can fill.
    batches = [2.0 + 3 * batch for batch in range(4) for _ in range(10)]
    flood = [n / (100 * share) for n in range(round((batches[-1] + 1) * 100 * share))]

    async def play(base_url: str, beside: bool) -> tuple[list[Answer], list[Answer]]:
        with client(base_url, "batch") as one, client(base_url, "flood") as other:
            flooding = asyncio.create_task(at_times(flood if beside else [], other.chat))
            waited = await at_times(batches, one.chat)
            return waited, await flooding

    waits, offered, errors = {}, 0, 0
    for beside in (False, True):
        with stage(QUICK, config) as through:
            answers, others = asyncio.run(play(through.weir.base_url, beside))
        waits[beside] = percentile((answer.queued for answer in answers), 95)
        errors += sum(not answer.good for answer in answers)
        offered += len(others)
    return [
        Row("offered by the flood, over its share", f"{offered / (batches[-1] + 1) / share:.0f}", "100"),
        Row("p95 of the batch's waits, alone", seconds(waits[False])),
        Row("p95 of the batch's waits, beside the flood", seconds(waits[True])),
        Row("beside, over alone", f"{waits[True] / waits[False]:.2f}", "2, as half of the quota is the other's"),
        Row("errors seen by the batch", str(errors), "0"),
    ]


def refused_and_back_when_told() -> list[Row]:
    """Half as much again as the quota is offered for ten seconds; who is refused sleeps as told, and tries again."""
    rate, tries = 20, 300

    async def play(base_url: str) -> tuple[int, int]:
        returned = served = 0

        async def until_served(of: Client) -> None:
            nonlocal returned, served
            answer = await of.chat()
            while answer.status != 200 and answer.retry_after is not None:
                await asyncio.sleep(answer.retry_after)
                answer = await of.chat()
                returned += 1
                served += answer.status == 200

        with client(base_url) as of:
            offered = [n / (1.5 * rate) for n in range(tries)]
            await asyncio.wait_for(at_times(offered, lambda: until_served(of)), 60)
        return returned, served

    rows = []
    for max_wait in ("500ms", "1s", "2s"):
        config = f"""
            [limits]
            {UNLIMITED}
            requests = {{ rate = "{rate}/s", burst = 1 }}
            [queue]
            max_wait = "{max_wait}" """
        with stage(QUICK, config) as through:
            begun = time.monotonic()
            returned, served = asyncio.run(play(through.weir.base_url))
            took = time.monotonic() - begun
        part = f"{served / returned:.3f} of {returned}" if returned else "nobody was refused"
        rows.append(Row(f"returns served in time, max_wait {max_wait}", part, "0.99"))
        rows.append(Row(f"until all are served, max_wait {max_wait}", seconds(took), seconds(tries / rate)))
    return rows


async def batch(due: list[float], base_url: str, **call: object) -> Batch:
    with client(base_url) as of:
        return Batch(await at_times(due, lambda: of.chat(**call)))


COLUMNS = FIGURES
CASES = [a_known_quota, a_known_token_quota, a_flood_beside_a_batch, refused_and_back_when_told]
