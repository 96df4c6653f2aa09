// Continues a text with an exported model in llama.cpp: node tests/llama/write.mjs MODEL.gguf TEXT [TOKENS]
// Takes the likeliest token each time, as `run.py --temperature 0` does, and prints the text as it comes.
import { getLlama, LlamaLogLevel, TokenBias } from "node-llama-cpp";

const [path, text, count = "80"] = process.argv.slice(2);
if (!text) {
    console.error("usage: node write.mjs MODEL.gguf TEXT [TOKENS]");
    process.exit(2);
}
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: path, gpuLayers: 0 });
const sequence = (await model.createContext({ contextSize: 4096, threads: 1 })).getSequence();
const tokenBias = TokenBias.for(model).set(model.fileInfo.metadata.tokenizer.ggml.suppress_tokens, "never");

process.stdout.write(text);
const prompt = [model.tokens.bos, ...model.tokenize(text, true)];
let written = 0;
for await (const token of sequence.evaluate(prompt, { temperature: 0, tokenBias })) {
    process.stdout.write(model.detokenize([token], true));
    if (++written === Number(count)) break;
}
console.log();
process.exit(0);
