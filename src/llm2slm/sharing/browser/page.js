// The server encodes the prompt; the small model writes the response here, with ONNX Runtime Web.
// Nothing is loaded from other hosts than this page's, and of the server nothing but the encoded prompt.

import * as ort from "onnxruntime-web";
import { Tokenizer } from "@huggingface/tokenizers";

const PAINT_MS = 40; // between two looks of the page at what is written
const element = (id) => document.getElementById(id);

// --------------------------------------------------------------------------------------------------- the small model
async function load() {
  const json = async (name) => (await fetch(name)).json();
  const session = (name) => ort.InferenceSession.create(name, { executionProviders: ["wasm"] });
  const [config, generation, vocabulary, settings, slm, embeddings] = await Promise.all([
    json("config.json"),
    json("generation_config.json"),
    json("tokenizer.json"),
    json("tokenizer_config.json"),
    session("model.onnx"),
    session("embed_tokens.onnx"),
  ]);
  const tokenizer = new Tokenizer(vocabulary, settings);
  return { config, endTokens: [generation.eos_token_id].flat(), maxTokens: generation.max_new_tokens, tokenizer, slm, embeddings };
}

const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

function emptyCache(slm) {
  const cache = {};
  for (const { name, shape } of slm.inputMetadata) {
    if (!name.startsWith("past_key_values.")) continue;
    const [, heads, , width] = shape.map(Number); // (1, key/value heads, past length, head width)
    cache[name] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, width]);
  }
  return cache;
}

// Yields the likeliest token, again and again, until the response ends: what `generate` writes greedily.
async function* write(model, promptEmbeds) {
  let embeds = promptEmbeds; // (1, length, width)
  let cache = emptyCache(model.slm);
  let length = 0;
  for (let count = 0; count < model.maxTokens; count++) {
    const added = embeds.dims[1];
    length += added;
    if (length > model.config.max_position_embeddings) return;
    const positions = Array.from({ length: added }, (_, i) => length - added + i);
    const output = await model.slm.run({
      inputs_embeds: embeds,
      attention_mask: integers(Array(length).fill(1)),
      position_ids: integers(positions),
      ...cache,
    });
    const logits = output.logits.data; // of the last position
    let token = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[token]) token = i;
    yield token;
    if (model.endTokens.includes(token)) return;
    for (const name in cache) cache[name] = output[name.replace("past_key_values", "present")];
    ({ inputs_embeds: embeds } = await model.embeddings.run({ input_ids: integers([token]) }));
  }
}

// -------------------------------------------------------------------------------------------------------- the server
// 16-bit numbers are half the bytes; browsers from before 2025 cannot read them.
async function encode(prompt, dtype = globalThis.Float16Array ? "float16" : "float32") {
  const key = element("key").value;
  const answer = await fetch(new URL("/v1/prompt_embeddings", element("server").value), {
    method: "POST",
    headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
    body: JSON.stringify({ prompt, encoding_format: "base64", dtype }),
  }).catch(() => {
    throw new Error("The server does not answer, or does not allow this page.");
  });
  const received = await answer.arrayBuffer();
  const content = JSON.parse(new TextDecoder().decode(received));
  if (content.error?.param === "dtype") return encode(prompt, "float32"); // too large for 16 bits
  if (!answer.ok) throw new Error(content.error.message);
  const [{ embedding, shape }] = content.data; // shape: (length, width)
  const bytes = Uint8Array.from(atob(embedding), (character) => character.charCodeAt(0));
  const values = dtype === "float16" ? Float32Array.from(new Float16Array(bytes.buffer)) : new Float32Array(bytes.buffer);
  return { embeds: new ort.Tensor("float32", values, [1, ...shape]), bytes: received.byteLength };
}

// ---------------------------------------------------------------------------------------------------------- the page
let model, encoded;

function show(tokens, started, first) {
  const ended = model.endTokens.includes(tokens.at(-1));
  const settings = { skip_special_tokens: true, clean_up_tokenization_spaces: false }; // as `generate`'s tokenizer does
  const text = model.tokenizer.decode(ended ? tokens.slice(0, -1) : tokens, settings);
  element("response").textContent = text.replace(/\uFFFD+$/, ""); // half a character: the other half is to come
  element("tokens").textContent = tokens.length;
  element("first").textContent = `${Math.round(first - started)} ms`;
  const seconds = (performance.now() - first) / 1000;
  if (tokens.length > 1) element("speed").textContent = ((tokens.length - 1) / seconds).toFixed(1);
  return ended;
}

async function writeResponse() {
  element("status").textContent = "Writing…";
  element("response").textContent = "";
  const tokens = [];
  const started = performance.now();
  let first, painted = started;
  for await (const token of write(model, encoded.embeds)) {
    first ??= performance.now();
    tokens.push(token);
    if (performance.now() - painted < PAINT_MS) continue;
    show(tokens, started, first);
    await new Promise((resolve) => setTimeout(resolve)); // lets the page paint
    painted = performance.now();
  }
  const ended = show(tokens, started, first);
  element("status").textContent = ended ? "Done." : `Cut after ${tokens.length} tokens.`;
}

async function atWork(work) {
  const buttons = [element("write"), element("again")];
  buttons.forEach((button) => (button.disabled = true));
  try {
    await work();
  } catch (error) {
    element("status").textContent = error.message;
  }
  element("write").disabled = false;
  element("again").disabled = !encoded;
}

element("write").onclick = () =>
  atWork(async () => {
    element("status").textContent = "The server reads the prompt…";
    encoded = await encode(element("prompt").value);
    element("received").textContent = `${(encoded.bytes / 1000).toFixed(1)} kB`;
    await writeResponse();
  });
element("again").onclick = () => atWork(writeResponse);

atWork(async () => {
  model = await load();
  element("status").textContent = "Ready.";
});
