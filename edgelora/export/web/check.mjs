// What transformers.js makes of an exported folder. In: {library, folder, texts, prompts, tokens} as JSON on stdin.
// Out: {version, tokens: ids of every text, answers: greedy ids after every prompt}.
import { basename, dirname } from "node:path";

let input = "";
for await (const piece of process.stdin) input += piece;
const { library, folder, texts, prompts, tokens } = JSON.parse(input);
const { env, AutoModelForCausalLM, AutoTokenizer, Tensor } = await import(library);

env.allowRemoteModels = false;
env.localModelPath = dirname(folder) + "/";
const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
const model = await AutoModelForCausalLM.from_pretrained(basename(folder), { device: "cpu" });
const split = (text) => tokenizer.encode(text, { add_special_tokens: false });
const answers = [];
for (const prompt of prompts) {
  const ids = split(prompt);
  const input_ids = new Tensor("int64", BigInt64Array.from(ids.map(BigInt)), [1, ids.length]);
  const attention_mask = new Tensor("int64", new BigInt64Array(ids.length).fill(1n), [1, ids.length]);
  const made = await model.generate({ input_ids, attention_mask, max_new_tokens: tokens, do_sample: false });
  answers.push(made.tolist()[0].slice(ids.length).map(Number));
}
const rendered = tokenizer.apply_chat_template([{ role: "user", content: "Hello" }], { tokenize: false, add_generation_prompt: true });
console.log(JSON.stringify({ version: env.version, tokens: texts.map((text) => split(text).map(Number)), answers, rendered }));
