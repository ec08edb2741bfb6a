"use strict";
/* What answers the page without a server: data/*.js bring everything by script tags, which browsers allow on pages
   that are opened from disk; nothing is asked of anybody. */
const arrived = new Map(), asked = new Map();
function m2data(name, content) { arrived.set(name, content); }
function data(name) {
  if (!asked.has(name)) asked.set(name, new Promise((keep, refuse) => {
    const script = document.createElement("script"), missing = () => { asked.delete(name); refuse(new Refused("missing", `data/${name}.js`)); };
    script.onload = () => { if (arrived.has(name)) keep(arrived.get(name)); else missing(); };
    script.onerror = missing; script.src = `data/${name}.js`; document.head.append(script);
  }));
  return asked.get(name);
}
function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return bytes;
}
async function unpack(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
const once = make => { let made = null; return () => made ??= make().catch(error => { made = null; throw error; }); };

const gallery = once(async () => {
  const found = await data("pictures"), halves = new Uint16Array(bytesOf(found.features).buffer), table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31, rest = bits & 1023;
    table[bits] = (bits >> 15 ? -1 : 1) * (exponent ? 2 ** (exponent - 15) * (1 + rest / 1024) : 2 ** -14 * (rest / 1024));
  }
  const features = new Float32Array(halves.length);
  for (let at = 0; at < halves.length; at++) features[at] = table[halves[at]];
  return { ...found, features, rows: new Map(found.names.map((name, row) => [name, row])) };
});
const runtime = once(async () => {
  const { script, wasm } = await data("runtime"), address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  try {
    const ort = await import(address);
    Object.assign(ort.env.wasm, { numThreads: 1, proxy: false, wasmBinary: (await unpack(wasm)).buffer });
    return ort;
  } finally { URL.revokeObjectURL(address); }
});
async function open(graph) { const ort = await runtime(); return ort.InferenceSession.create(await unpack(graph), { executionProviders: ["wasm"] }); }
const textModel = once(async () => {
  const found = await data("text");
  return { tokenizer: new Tokenizer(found.tokenizer, await unpack(found.characters)), session: await open(found.graph) };
});
const imageModel = once(async () => { const found = await data("image"); return { ...found, session: await open(found.graph) }; });
let turn = Promise.resolve();
function run(session, name, type, values, shape) {  /* one at a time */
  const mine = turn.then(async () => {
    const ort = await runtime(), answer = await session.run({ [name]: new ort.Tensor(type, values, shape) });
    return Object.values(answer)[0].data;
  });
  turn = mine.catch(() => {});
  return mine;
}
async function encodeText(text) {
  const { tokenizer, session } = await textModel(), ids = tokenizer.encode(text);
  return run(session, "input_ids", "int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
}
async function encodePicture(file) {
  const { session, side, policy } = await imageModel();
  let pixels;
  try { pixels = await readPixels(file, side, policy); } catch (error) { throw error instanceof Refused ? error : new Refused("no_picture", file.name); }
  return run(session, "pixel_values", "float32", pixels, [1, 3, side, side]);
}

async function encodeQuery(terms, picture, { names, rows, features }) {
  const parts = [], size = features.length / names.length;
  for (const { weight, kind, content } of terms) {
    if (kind === "picture" && !rows.has(content)) throw new Refused("no_picture_of_this_name", content);
    parts.push([weight, kind === "words" ? await encodeText(content) : features.subarray(rows.get(content) * size, (rows.get(content) + 1) * size)]);
  }
  if (picture) parts.push([1, await encodePicture(picture.file)]);
  const total = new Float64Array(size);
  for (const [weight, part] of parts) for (let at = 0; at < size; at++) total[at] += weight * part[at];
  const length = Math.hypot(...total);
  if (!(length >= 1e-3)) throw new Refused("invalid", "the terms of the query cancel each other; nothing is left to search for");
  return total.map(value => value / length);
}
/* All pictures, best first, and where the likely ones end, as `picture_search.ending.find_end` finds it. */
function rank(query, { names, features, ending }, without) {
  const size = query.length, scores = new Float32Array(names.length);
  for (let row = 0; row < names.length; row++) { let sum = 0; for (let at = 0; at < size; at++) sum += features[row * size + at] * query[at]; scores[row] = Math.min(1, Math.max(-1, sum)); }
  const order = [...scores.keys()].filter(row => !without.includes(row)).sort((a, b) => scores[b] - scores[a] || a - b);
  const sample = scores.filter((_, row) => row % ending.step === 0), mean = sample.reduce((sum, each) => sum + each, 0) / sample.length;
  const spread = Math.sqrt(sample.reduce((sum, each) => sum + (each - mean) ** 2, 0) / sample.length);
  const copies = order.findIndex(row => scores[row] < ending.copy), rest = copies < 0 ? [] : order.slice(copies, 1000);
  const least = rest.length ? mean + Math.max(ending.lift * (scores[rest[0]] - mean), ending.chance * spread) : 0;
  return { order, scores, end: (copies < 0 ? order.length : copies) + rest.filter(row => scores[row] >= least).length };
}

/* Small pictures of neighbouring rows. */
const packs = new Map();
function thumbnails(number) {
  if (!packs.has(number)) packs.set(number, once(async () => {
    const { sizes, bytes } = await data(`thumbnails-${number}`), all = bytesOf(bytes);
    let from = 0;
    return sizes.map(size => new Blob([all.subarray(from, from += size)]));
  }));
  return packs.get(number)();
}
const drawn = new Map();  /* addresses by row */
let last = null;
const backend = {
  words: {
    zh: { missing: "data 文件夹里缺少文件或文件已损坏，请重新完整复制这个文件夹", gone: "这个浏览器无法运行模型，请换用较新的版本" },
    en: { missing: "A file of the folder data is missing or damaged: copy the whole folder again", gone: "This browser cannot run the model; use a newer one" },
  },
  async count() { return (await gallery()).names.length; },
  async find(what, start, count) {
    const from = performance.now(), found = await gallery();
    if (!what.text && !what.picture && !what.like) return { total: found.names.length, results: found.names.slice(start, start + count).map(name => ({ name })) };
    if (!start || !last || last.text !== what.text || last.picture !== what.picture || last.like !== what.like) {
      const terms = what.like ? [{ weight: 1, kind: "picture", content: what.like }] : what.text ? parseQuery(what.text, found.suffixes, name => found.rows.has(name)) : [];
      const own = terms.filter(term => term.kind === "picture").map(term => found.rows.get(term.content));
      last = { text: what.text, picture: what.picture, like: what.like, ...rank(await encodeQuery(terms, what.like ? null : what.picture, found), found, own) };
    }
    const results = last.order.slice(start, start + count).map(row => ({ name: found.names[row], score: last.scores[row] }));
    return { total: last.order.length, end: last.end, took_ms: performance.now() - from, results };
  },
  async draw(image, name) {
    image.dataset.wanted = name;
    try {
      const { rows, packs: firsts } = await gallery(), row = rows.get(name), pack = firsts.findLastIndex(first => first <= row);
      const blob = (await thumbnails(pack))[row - firsts[pack]];
      if (!drawn.has(row)) drawn.set(row, URL.createObjectURL(blob));
      if (image.dataset.wanted === name) image.src = drawn.get(row);
    } catch { image.dataset.again = "1"; image.dispatchEvent(new Event("error")); }
  },
  original() { return null; },
  async alive() { return false; },
};
