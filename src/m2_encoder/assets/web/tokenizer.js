"use strict";
/* Text to token ids with a SentencePiece file of the kind unigram, as SentencePieceTokenizer does it. Works on UTF-8:
   a "binary" string has a character per byte, so that pieces can be looked up in a Map. */
class Tokenizer {
  /* recipe: what `describe_tokenizer` wrote. characters: its table of characters, bytes. */
  constructor(recipe, characters) {
    this.recipe = recipe;
    const own = recipe.pieces.map(Tokenizer.binary), kinds = [...recipe.kinds];
    this.ids = new Map(); this.exempt = []; this.bytes = new Map();
    let least = Infinity, most = -Infinity;
    own.forEach((piece, id) => {
      if (kinds[id] === "n" || kinds[id] === "d") this.ids.set(piece, id);
      if (kinds[id] === "n") { least = Math.min(least, recipe.scores[id]); most = Math.max(most, recipe.scores[id]); }
      if (kinds[id] === "d") this.exempt.push(piece);
      if (kinds[id] === "b") this.bytes.set(parseInt(recipe.pieces[id].slice(3, 5), 16), id);
    });
    this.exempt.sort((a, b) => b.length - a.length);
    this.exemptStarts = new Set(this.exempt.map(piece => piece[0]));
    this.longest = Math.max(...[...this.ids.keys()].map(piece => piece.length));
    this.isExempt = kinds.map(kind => kind === "d");
    this.most = Math.fround(most); this.unknownScore = Math.fround(Math.fround(least) - 10);
    this.rules = recipe.rules.map(([pattern, text]) => [new RegExp(pattern, "gu"), text]);
    const literals = Object.keys(recipe.literals).map(piece => piece.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.literals = new RegExp(`(${literals.join("|")})`, "u");
    if (characters.length) {
      const size = new DataView(characters.buffer, characters.byteOffset).getUint32(0, true);
      this.trie = new Uint32Array(characters.slice(4, 4 + size).buffer); this.texts = characters.subarray(4 + size);
    }
  }
  static binary(text) { let made = ""; for (const byte of new TextEncoder().encode(text)) made += String.fromCharCode(byte); return made; }

  /* Ids of a text, with the first and the last one of the template, cut to the context. */
  encode(text) {
    text = new TextDecoder().decode(new TextEncoder().encode(text)); // lone surrogates
    for (const [pattern, replacement] of this.rules) text = text.replace(pattern, replacement);
    const parts = text.split(this.literals), ids = [];
    parts.forEach((part, at) => {
      if (at % 2) { ids.push(this.recipe.literals[part]); return; }
      if (at > 0) part = part.replace(/^(?:[^\S\ufeff]|[\x1c-\x1f\x85])+/u, "");
      if (at < parts.length - 1) part = part.replace(/(?:[^\S\ufeff]|[\x1c-\x1f\x85])+$/u, "");
      if (part || parts.length === 1) ids.push(...this.encodeSegment(part));
    });
    const kept = this.recipe.context_length - 2;
    const cut = ids.length <= kept ? ids : this.recipe.truncation_side === "left" ? ids.slice(ids.length - kept) : ids.slice(0, kept);
    return [this.recipe.cls_id, ...cut, this.recipe.end_id];
  }
  encodeSegment(text) {
    for (const [spaces, piece] of this.recipe.blanks) text = text.replaceAll(spaces, piece);
    return this.cut(this.normalise(Tokenizer.binary(text)));
  }

  /* What the table of characters makes of the text from a place on, and how many bytes that takes. */
  changeAt(text, from) {
    if (this.exemptStarts.has(text[from])) {
      const piece = this.exempt.find(each => text.startsWith(each, from));
      if (piece) return [piece, piece.length];
    }
    let length = 0, value = 0;
    if (this.trie) {
      const trie = this.trie, offset = unit => (unit >>> 10) << ((unit & 512) >>> 6);
      let node = offset(trie[0]);
      for (let at = from; at < text.length; at++) {
        const byte = text.charCodeAt(at);
        node ^= byte;
        const unit = trie[node];
        if (unit === undefined || (unit & 0x800000ff) !== byte) break;
        node ^= offset(unit);
        if ((unit >>> 8) & 1) { length = at + 1 - from; value = trie[node] & 0x7fffffff; }
      }
    }
    if (!length) { const size = Tokenizer.size(text, from); return [text.slice(from, from + size), size]; }
    let made = "";
    for (let at = value; this.texts[at]; at++) made += String.fromCharCode(this.texts[at]);
    return [made, length];
  }
  static size(text, at) { const byte = text.charCodeAt(at); return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4; }

  normalise(text) {
    const space = Tokenizer.binary("▁"), trims = this.recipe.trims_blanks;
    let at = 0;
    while (trims && at < text.length) { const [part, taken] = this.changeAt(text, at); if (part !== " ") break; at += taken; }
    if (at >= text.length) return "";
    let made = space, afterSpace = trims;
    while (at < text.length) {
      let [part, taken] = this.changeAt(text, at);
      while (afterSpace && part.startsWith(" ")) part = part.slice(1);
      if (part) { made += part.replaceAll(" ", space); afterSpace = trims && part.endsWith(" "); }
      at += taken;
    }
    while (trims && made.endsWith(space)) made = made.slice(0, -space.length);
    return made;
  }

  /* The best cut into pieces; sums are of 32 bits, as SentencePiece's, so that equal ones are equal here, too. */
  cut(text) {
    const best = new Array(text.length + 1).fill(null);
    best[0] = { score: 0, from: -1, id: -1 };
    const offer = (from, to, id, score) => { score = Math.fround(score); if (!best[to] || score > best[to].score) best[to] = { score, from, id }; };
    for (let from = 0; from < text.length;) {
      const size = Tokenizer.size(text, from), score = best[from].score;
      let single = false;
      for (let length = 1; length <= this.longest && from + length <= text.length; length++) {
        const id = this.ids.get(text.slice(from, from + length));
        if (id === undefined) continue;
        offer(from, from + length, id, score + (this.isExempt[id] ? length * this.most - 0.1 : Math.fround(this.recipe.scores[id])));
        single ||= length === size;
      }
      if (!single) offer(from, from + size, this.recipe.unknown_id, score + this.unknownScore);
      from += size;
    }
    const found = [];
    for (let to = text.length; to > 0; to = best[to].from) found.unshift([best[to].id, text.slice(best[to].from, to)]);
    const ids = [];
    for (const [id, piece] of found) {
      if (id !== this.recipe.unknown_id) ids.push(id);
      else if (this.recipe.byte_fallback) for (const byte of piece) ids.push(this.bytes.get(byte.charCodeAt(0)));
      else if (ids.at(-1) !== id) ids.push(id);
    }
    return ids;
  }
}
