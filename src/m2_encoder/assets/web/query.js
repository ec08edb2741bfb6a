"use strict";
/* The terms of a query, as `picture_search.query.parse_query` reads them: [{weight, kind, content}]. */
function parseQuery(text, suffixes, isPicture = () => false) {
  const quoted = '"[^"]*"|“[^”]*”|「[^」]*」', suffix = suffixes.map(each => each.replace(".", "\\.")).join("|");
  const number = "[0-9]+(?:\\.[0-9]+)?|\\.[0-9]+", times = "\\s*[*×＊]\\s*", sign = "[+＋－\\-]", weight = `(?:(?<weight>${number})${times})?`;
  const term = new RegExp(`\\s*(?<sign>${sign}?)\\s*${weight}(?<content>${quoted}|[^\\s"“”「」]+?(?:${suffix}))(?=\\s|${sign}|$)`, "iuy");
  const joined = new RegExp(`^${sign}?\\s*(?:${number})${times}|^${sign}?\\s*(?:${quoted})|(?:${quoted})\\s*${sign}|(?:^|\\s)${sign}\\s*${weight}["“「]|[0-9]${times}["“「]`, "u");
  const kindOf = content => new RegExp(`^.*(?:${suffix})$`, "isu").test(content) ? "picture" : "words";
  const whole = text.trim(), terms = [];
  if ([...text].length > 4096) throw new Refused("invalid", `the query has ${[...text].length} characters, at most 4096 are read`);
  for (const name of [text, whole]) if (isPicture(name)) return [{ weight: 1, kind: "picture", content: name }];
  let end = 0;
  for (;;) {
    term.lastIndex = end;
    const found = term.exec(whole);
    if (!found || (terms.length && !found.groups.sign)) break;
    const content = found.groups.content.replace(/^["“「](.*)["”」]$/su, "$1");
    terms.push({ weight: (["-", "－"].includes(found.groups.sign) ? -1 : 1) * Number(found.groups.weight || 1), kind: kindOf(content), content });
    end = term.lastIndex;
  }
  if (end < whole.length || !terms.length) {
    if (joined.test(whole)) throw new Refused("invalid", `the query cannot be read from ${whole.slice(end).trim().slice(0, 60)} on`);
    return [{ weight: 1, kind: kindOf(whole), content: whole }];
  }
  if (terms.length > 16) throw new Refused("invalid", `the query has ${terms.length} terms, at most 16 are read`);
  for (const each of terms) {
    if (!each.content.trim()) throw new Refused("invalid", "the query has a term without words");
    if (!(Math.abs(each.weight) > 0 && Math.abs(each.weight) <= 100)) throw new Refused("invalid", `weights are above 0, at most 100, not ${Math.abs(each.weight)}`);
  }
  return terms;
}
