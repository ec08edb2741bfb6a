"use strict";
/* A picture file as the model wants it: RGB on the background of its policy, squashed to a square by a bicubic resize
   with antialias in whole numbers of 8 bits, as Pillow does it, over 255. Limits are those of m2-serve. */
const MAX_BYTES = 32 * 2 ** 20, MAX_PIXELS = 89478485;
async function readPixels(file, side, policy) {
  if (file.size > MAX_BYTES) throw new Refused("too_large", file.name);
  const bitmap = await createImageBitmap(file, { imageOrientation: policy.orientation === "ignored" ? "none" : "from-image", colorSpaceConversion: "none" });
  if (bitmap.width * bitmap.height > MAX_PIXELS) throw new Refused("too_large", file.name);
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width; canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = { grey: "rgb(128 128 128)", black: "#000" }[policy.background] || "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height); context.drawImage(bitmap, 0, 0); bitmap.close();
  const { data, width, height } = context.getImageData(0, 0, canvas.width, canvas.height);
  const rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) { rgb[to++] = data[from]; rgb[to++] = data[from + 1]; rgb[to++] = data[from + 2]; }
  const small = resize(rgb, width, height, side), pixels = new Float32Array(3 * side * side);
  for (let at = 0; at < side * side; at++) for (let channel = 0; channel < 3; channel++) pixels[channel * side * side + at] = small[3 * at + channel] / 255;
  return pixels;
}

/* RGB of `width` x `height` to `side` x `side`: first along rows, then along columns. */
function resize(rgb, width, height, side) {
  const along = (source, rows, length, step, between) => {
    if (length === side) return source;
    const { starts, weights } = weigh(length, side), made = new Uint8Array(rows * side * 3);
    for (let row = 0; row < rows; row++) for (let at = 0; at < side; at++) for (let channel = 0; channel < 3; channel++) {
      let sum = 1 << 21;
      const first = row * between(length) + starts[at] * step(rows) + channel;
      for (let k = 0; k < weights[at].length; k++) sum += source[first + k * step(rows)] * weights[at][k];
      made[row * between(side) + at * step(rows) + channel] = Math.min(255, Math.max(0, sum >> 22));
    }
    return made;
  };
  const wide = along(rgb, height, width, () => 3, length => 3 * length);
  return along(wide, side, height, rows => 3 * rows, () => 3);
}

/* For each place of the result: where it begins to look, and weights of 22 bits. */
function weigh(length, side) {
  const scale = length / side, wide = Math.max(scale, 1), starts = [], weights = [];
  const cubic = x => { x = Math.abs(x); return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0; };
  for (let at = 0; at < side; at++) {
    const centre = (at + 0.5) * scale, from = Math.max(0, Math.trunc(centre - 2 * wide + 0.5)), to = Math.min(length, Math.trunc(centre + 2 * wide + 0.5));
    const own = []; let sum = 0;
    for (let x = from; x < to; x++) { const weight = cubic((x - centre + 0.5) / wide); own.push(weight); sum += weight; }
    starts.push(from); weights.push(own.map(weight => { const share = weight / sum * (1 << 22); return Math.trunc(share < 0 ? share - 0.5 : share + 0.5); }));
  }
  return { starts, weights };
}
