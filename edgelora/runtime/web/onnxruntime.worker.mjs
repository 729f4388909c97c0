// Runs a decoder graph: input_ids, attention_mask [, position_ids], past_key_values.* -> logits, present.*
import * as ort from "/ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = "/ort/";
let session, empty;

const model = {
  async load({ files, threads }) {
    const began = performance.now();
    ort.env.wasm.numThreads = threads;
    const [graph, ...data] = files;
    const externalData = data.map((name) => ({ path: name, data: `/model/${encodeURIComponent(name)}` }));
    session = await ort.InferenceSession.create(`/model/${encodeURIComponent(graph)}`, { executionProviders: ["wasm"], externalData });
    const past = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."));
    empty = Object.fromEntries(past.map(({ name, type, shape: [, heads, , size] }) => {
      if (typeof heads !== "number" || typeof size !== "number") throw new Error(`${name} does not say its heads and their size`);
      return [name, new ort.Tensor(type, nothing(type), [1, heads, 0, size])];
    }));
    return { load_ms: performance.now() - began, version: ort.env.versions.web, isolated: self.crossOriginIsolated, threads: ort.env.wasm.numThreads };
  },

  async time({ prompt, n }) {
    const began = performance.now();
    const feed = context();
    let logits = await feed(prompt.ids);
    let token = likeliest(logits, logits.dims[1] - 1);
    let now = performance.now();
    postMessage({ event: "first token" });
    const ttft_ms = now - began, decode_ms = [];
    for (let made = 0; made < n; made += 1) {
      token = likeliest(await feed([token]), 0);
      const before = now;
      now = performance.now();
      decode_ms.push(now - before);
    }
    return { prompt_tokens: prompt.ids.length, ttft_ms, decode_ms };
  },

  async answer({ prompt, most, stop }) {
    const feed = context();
    const found = { prompt_tokens: prompt.ids.length, ids: [], logprobs: [], likeliest: [] };
    let logits = await feed(prompt.ids);
    while (true) {
      const at = logits.dims[1] - 1, token = likeliest(logits, at);
      found.ids.push(token);
      found.likeliest.push(token);
      found.logprobs.push(logprob(logits, at, token));
      if (stop.includes(token) || found.ids.length === most) return found;
      logits = await feed([token]);
    }
  },

  // Tokens that are given, as if the model had written them.
  async follow({ prompt, answer: ids }) {
    const logits = await context()([...prompt.ids, ...ids.slice(0, -1)]);
    const at = (i) => prompt.ids.length - 1 + i;
    return {
      prompt_tokens: prompt.ids.length,
      ids,
      logprobs: ids.map((id, i) => logprob(logits, at(i), id)),
      likeliest: ids.map((_, i) => likeliest(logits, at(i))),
    };
  },
};

// feed(ids) appends ids to an empty context and gives their logits, [1, ids, vocabulary].
function context() {
  let past = empty, length = 0;
  return async (ids) => {
    const total = length + ids.length;
    const inputs = {
      ...past,
      input_ids: int64(ids),
      attention_mask: int64(Array(total).fill(1)),
    };
    if (session.inputNames.includes("position_ids")) inputs.position_ids = int64(ids.map((_, i) => length + i));
    const outputs = await session.run(inputs);
    past = Object.fromEntries(Object.keys(empty).map((name) => [name, outputs[name.replace("past_key_values", "present")]]));
    length = total;
    return outputs.logits;
  };
}

const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const nothing = (type) => (type === "float16" ? new Uint16Array(0) : new Float32Array(0));

function row(logits, at) {
  const vocabulary = logits.dims[2];
  return logits.data.subarray(at * vocabulary, (at + 1) * vocabulary);
}

function likeliest(logits, at) {
  const values = row(logits, at);
  let best = 0;
  for (let i = 1; i < values.length; i += 1) if (values[i] > values[best]) best = i;
  return best;
}

function logprob(logits, at, id) {
  const values = row(logits, at), most = values[likeliest(logits, at)];
  let sum = 0;
  for (let i = 0; i < values.length; i += 1) sum += Math.exp(values[i] - most);
  return values[id] - most - Math.log(sum);
}

onmessage = async ({ data: { call, name, args } }) => {
  try {
    postMessage({ call, result: await model[name](args) });
  } catch (error) {
    postMessage({ call, error: String(error.message ?? error) });
  }
};
