// The OpenAI SDK for Node through weir. Started by test_openai_node.py, which sets the addresses:
// OPENAI_BASE_URL, a weir before a quick gateway; SLOW_BASE_URL and SLOW_METRICS_URL, a weir with one
// slot before a gateway that sends one token a minute.

import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: "any" });
const slowClient = new OpenAI({ baseURL: process.env.SLOW_BASE_URL, apiKey: "any" });
const call = { model: "gpt-4.1-mini", messages: [{ role: "user", content: "장화를 하나 골라 주세요." }] };

test("a plain call brings text and usage", async () => {
  const answer = await client.chat.completions.create(call);
  assert.ok(answer.choices[0].message.content);
  assert.ok(answer.usage.total_tokens > 0);
});

test("a stream brings its pieces and its usage", async () => {
  const stream = await client.chat.completions.create({
    ...call,
    stream: true,
    stream_options: { include_usage: true },
  });
  let pieces = 0;
  let usage;
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta?.content) pieces += 1;
    usage = chunk.usage ?? usage;
  }
  assert.ok(pieces > 1);
  assert.ok(usage.total_tokens > 0);
});

test("thirty calls at once are all answered", async () => {
  const answers = await Promise.all(Array.from({ length: 30 }, () => client.chat.completions.create(call)));
  assert.ok(answers.every((answer) => answer.choices[0].message.content));
});

test("an aborted stream gives back its slot", async () => {
  // There is one slot, so the second stream begins only once the first has given it back.
  for (let round = 0; round < 2; round += 1) {
    const stream = await slowClient.chat.completions.create({ ...call, stream: true });
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      assert.equal(await inFlight(), 1);
      stream.controller.abort();
      break;
    }
    await until("nothing is in flight", async () => (await inFlight()) === 0);
  }
});

async function inFlight() {
  const text = await (await fetch(process.env.SLOW_METRICS_URL)).text();
  return [...text.matchAll(/^weir_in_flight(?:\{.*\})? (\S+)$/gm)].reduce((sum, [, value]) => sum + Number(value), 0);
}

async function until(what, event) {
  const end = Date.now() + 20_000;
  while (!(await event())) {
    assert.ok(Date.now() < end, `waited in vain: ${what}`);
    await pause(10);
  }
}
