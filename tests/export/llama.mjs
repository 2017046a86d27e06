// Real llama.cpp, through node-llama-cpp: for each job on standard input, what the GGUF file tokenizes and says.
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const entry = createRequire(process.argv[2] + "/package.json").resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: LlamaLogLevel.error});

async function logitsAfter(sequence, tokens) {
    await sequence.clearHistory();
    const asked = tokens.map((token) => [token, {generateNext: {logits: true, options: {temperature: 0}}}]);
    const answers = await sequence.controlledEvaluate(asked);
    return answers.map(({next}) => {
        const row = new Array(next.logits.size);
        for (const [token, logit] of next.logits) row[token] = logit;
        return row;
    });
}

async function greedy(sequence, tokens, count) {
    await sequence.clearHistory();
    const found = [];
    for await (const token of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        found.push(token);
        if (found.length === count) break;
    }
    return found;
}

async function run({file, texts, prompts, count, read, embed}) {
    const model = await llama.loadModel({modelPath: file, useMmap: false});
    const answer = {tokens: texts.map((text) => model.tokenize(text))};
    answer.texts = answer.tokens.map((tokens) => model.detokenize(tokens));
    if (embed) {
        const context = await model.createEmbeddingContext({contextSize: 128, threads: 1});
        answer.vectors = [];
        for (const text of embed) answer.vectors.push((await context.getEmbeddingFor(text)).vector);
    } else {
        const settings = {contextSize: 128, threads: 1, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
        const sequence = (await model.createContext({...settings, flashAttention: false})).getSequence();
        answer.greedy = [];
        for (const prompt of prompts) answer.greedy.push(await greedy(sequence, prompt, count));
        answer.logits = [];
        for (const tokens of read) answer.logits.push(await logitsAfter(sequence, tokens));
    }
    await model.dispose();
    return answer;
}

const answers = [];
for (const job of JSON.parse(readFileSync(0, "utf8"))) answers.push(await run(job));
process.stdout.write(JSON.stringify(answers), () => process.exit(0));
