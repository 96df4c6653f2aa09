// llama.cpp for tests/test_llama_cpp.py: reads requests from standard input, one JSON object a line, and answers each.
import readline from "node:readline";
import { Template } from "@huggingface/jinja";
import { getLlama, LlamaLogLevel, TokenBias } from "node-llama-cpp";

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error,
});
let model, sequence, never;

async function load({ path, context, threads }) {
    await model?.dispose();
    model = await llama.loadModel({ modelPath: path, gpuLayers: 0 });
    sequence = (await model.createContext({ contextSize: context, threads })).getSequence();
    const { suppress_tokens: suppressed = [] } = model.fileInfo.metadata.tokenizer.ggml;
    never = TokenBias.for(model).set(suppressed, "never"); // as llama-server does
    return { tokens: [...model.iterateAllTokens()].length, suppressed };
}

function tokenize({ texts }) {
    return texts.map((text) => model.tokenize(text, true));
}

// As a server does: the template of the file makes one text of the messages, in which special words count.
function conversation({ messages }) {
    const template = new Template(model.fileInfo.metadata.tokenizer.chat_template);
    return [model.tokens.bos, ...model.tokenize(template.render({ messages, add_generation_prompt: true }), true)];
}

// For every place of `ids` the probability of each token that may follow, in the order of their ids.
async function probabilities({ ids }) {
    await sequence.clearHistory();
    const found = await sequence.controlledEvaluate(ids.map((id) => [id, { generateNext: { probabilities: true } }]));
    return found.map(({ next }) => {
        const row = [];
        for (const [id, p] of next.probabilities) row[id] = p;
        return row;
    });
}

// The sum of -log p over ids[1:], in nats.
async function nats({ ids }) {
    await sequence.clearHistory();
    let sum = 0;
    for (let i = 0; i + 1 < ids.length; i += 256) {
        const part = ids.slice(i, Math.min(i + 256, ids.length - 1));
        const found = await sequence.controlledEvaluate(
            part.map((id) => [id, { generateNext: { probabilities: true } }]));
        found.forEach(({ next }, k) => (sum -= Math.log(next.probabilities.get(ids[i + k + 1]))));
    }
    return sum;
}

// What follows `ids`: at most `count` tokens, until the end of the document or through it. Temperature 0: the likeliest.
async function generate({ ids, count, temperature, seed, through }) {
    await sequence.clearHistory();
    const options = { temperature, seed, topK: 0, topP: 1, minP: 0, tokenBias: never, yieldEogToken: through };
    const written = [];
    for await (const id of sequence.evaluate(ids, options)) {
        written.push(id);
        if (written.length === count) break;
    }
    return written;
}

// Token by token, as a server streams: several at once would lose spaces before punctuation.
function detokenize({ ids }) {
    return ids.map((id) => model.detokenize([id], true)).join("");
}

const operations = { load, tokenize, conversation, detokenize, probabilities, nats, generate };
for await (const line of readline.createInterface({ input: process.stdin, crlfDelay: Infinity })) {
    const { operation, ...values } = JSON.parse(line);
    console.log(JSON.stringify(await operations[operation](values)));
}
process.exit(0);
