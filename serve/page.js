"use strict";
/* The search page. `state` is the whole query and what is open; the address is made of it, and it is read from the
   address again. Every change goes through `go`, which shows the state and asks for its answer. */

const LEAST = -0.01; // of the slider: no minimum score
const SUBTRACTED = 0.5; // what all terms that are subtracted weigh together; those that are added weigh 1
const DEFAULTS = { topK: 24, minScore: LEAST };
const DEBOUNCE = 140; // milliseconds without a key before a query is sent
const MOST_TERMS = 15; // beside the text in the box
const RETRY = 2000; // milliseconds until a server that does not answer is asked again
const UPLOAD_SIZE = 640; // pixels, the longer side of an image that is sent

const byId = (id) => document.getElementById(id);
const uploads = new Map(); // key -> {name, url, base64, sha256}; images of the user's own, for as long as the page is open
let info = null;
let state = null;
let hits = []; // what the grid shows
let asked = ""; // the query whose answer the grid shows
let waiting = null; // the request under way
let typing = ""; // what goes on changing, as a text does with each key
let notice = ""; // about the address that was opened, until the query changes
let refused = ""; // why an image of the user's own was taken out of the query
let timer = 0;
let map = null;
let shownItem = null; // the item in the dialog
let opener = null; // the card that the dialog was opened from

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const nounOf = (kind) => (kind === "image" ? "image" : "caption");
const thumbnail = (id) => `api/items/image/thumbnail?id=${encodeURIComponent(id)}&stamp=${info.stamp}`;
const scoreOf = (score, digits = 3) => score.toFixed(digits).replace("-", "−");
/* An id as it is shown: of a whole path, which says where files lie, the file and its folder. */
const nameOf = (id) => (/^([/\\]|[A-Za-z]:[/\\])/.test(id) ? id.split(/[/\\]/).slice(-2).join("/") : id);
const has = (kind) => info.galleries.some((gallery) => gallery.kind === kind);

async function fetchJson(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is it still running?");
  }
  const value = await answer.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  if (answer.ok && value) return value;
  const busy = answer.status === 503 ? "The server is busy; try again." : `The server answered ${answer.status}.`;
  const error = new Error(value?.error || (answer.ok ? "The answer was cut off; try again." : busy));
  error.status = answer.status;
  throw error;
}

/* ---- the state and the address ---- */

/* A term of the query: {sign, kind: "text" | "item" | "upload", value, of: "image" | "text" for an item}. */
function termToText(term) {
  return `${term.sign}${term.kind === "item" ? `${term.of}:` : "text:"}${term.value}`;
}

function termFromText(text) {
  const parts = /^([+-])(text|image|caption):([^]+)$/.exec(text);
  if (!parts) return null;
  const [, sign, what, value] = parts;
  if (what === "text") return { sign, kind: "text", value };
  return { sign, kind: "item", of: what, value };
}

function addressOf(shown) {
  const parameters = new URLSearchParams();
  if (shown.text || shown.sign === "-") parameters.set(shown.sign === "-" ? "not" : "q", shown.text);
  for (const term of shown.terms) if (term.kind !== "upload") parameters.append("term", termToText(term));
  if (shown.gallery !== info.galleries[0].kind) parameters.set("in", nounOf(shown.gallery) + "s");
  if (shown.topK !== DEFAULTS.topK) parameters.set("k", shown.topK);
  if (shown.minScore !== DEFAULTS.minScore) parameters.set("least", shown.minScore);
  if (shown.view === "map") parameters.set("view", "map");
  if (shown.open) parameters.set("open", `${nounOf(shown.open.kind)}:${shown.open.id}`);
  const query = parameters.toString();
  return query ? `?${query}` : location.pathname;
}

function stateFromAddress() {
  const parameters = new URLSearchParams(location.search);
  const gallery = parameters.get("in") === "captions" ? "text" : "image";
  const open = /^(image|caption):([^]+)$/.exec(parameters.get("open") || "");
  const terms = parameters.getAll("term").map(termFromText).filter(Boolean);
  if (terms.length > MOST_TERMS) notice = `The address has ${terms.length} terms; a query takes the first ${MOST_TERMS}.`;
  const number = (name, least, most, otherwise) => {
    const value = parameters.has(name) ? Number(parameters.get(name)) : NaN;
    return value >= least && value <= most ? value : otherwise;
  };
  return {
    text: parameters.get("q") || parameters.get("not") || "",
    sign: parameters.has("not") && !parameters.get("q") ? "-" : "+", // of the text in the box
    terms: terms.slice(0, MOST_TERMS),
    gallery: parameters.has("in") && has(gallery) ? gallery : info.galleries[0].kind,
    topK: Math.round(number("k", 1, 100, DEFAULTS.topK)),
    minScore: number("least", LEAST, 1, DEFAULTS.minScore),
    view: parameters.get("view") === "map" && has("image") ? "map" : "search",
    open: open ? { kind: open[1] === "image" ? "image" : "text", id: open[2] } : null,
  };
}

/* Where images of the user's own stand among the terms; it is kept with the entry of the browser's history. */
function restored() {
  notice = "";
  const shown = stateFromAddress();
  for (const { index, term } of history.state?.uploads ?? []) {
    if (uploads.get(term.value)) shown.terms.splice(index, 0, term);
    else if (!uploads.has(term.value)) notice = "This query had an image of your own, which is not part of the address: add it again.";
  }
  return shown;
}

function writeAddress(replaces) {
  const own = [];
  state.terms.forEach((term, index) => {
    if (term.kind === "upload") own.push({ index, term });
  });
  const entry = [{ uploads: own }, "", addressOf(state)];
  if (replaces) history.replaceState(...entry);
  else history.pushState(...entry);
  document.title = titleOf(state);
}

function titleOf(shown) {
  const words = shown.terms.map((term) => `${term.sign === "-" ? "−" : ""}${labelOf(term)}`);
  if (shown.text) words.unshift(`${shown.sign === "-" ? "−" : ""}${shown.text}`);
  return [words.join(" + ").slice(0, 80), "onceover"].filter(Boolean).join(" · ");
}

const labelOf = (term) => {
  if (term.kind === "upload") return uploads.get(term.value).name;
  return term.kind === "item" ? nameOf(term.value) : term.value;
};

/* Changes the state. `goesOn` names what goes on changing, as a text does with each key: all of it has one entry in the
   browser's history, and is answered when there has been no further change for a moment. */
function go(changes, { goesOn = "" } = {}) {
  if (!state) return; // nothing is known of the server yet
  const isSame = Boolean(goesOn) && typing === goesOn;
  typing = goesOn;
  notice = "";
  state = { ...state, ...changes };
  writeAddress(isSame);
  show();
  ask(goesOn ? DEBOUNCE : 0);
}

window.addEventListener("popstate", () => {
  if (!state) return;
  typing = "";
  state = restored();
  document.title = titleOf(state);
  show();
  ask(0);
});

/* ---- the query and its answer ---- */

function requestOf(shown) {
  const all = shown.text.trim() ? [{ sign: shown.sign, kind: "text", value: shown.text }, ...shown.terms] : shown.terms;
  const subtracted = all.filter((term) => term.sign === "-").length;
  const terms = all.map((term) => {
    const weight = term.sign === "-" ? -SUBTRACTED / subtracted : 1 / (all.length - subtracted);
    if (term.kind === "text") return { text: term.value, weight };
    if (term.kind === "upload") {
      const { base64, sha256 } = uploads.get(term.value);
      return { image: base64, sha256, weight };
    }
    return { item: term.value, kind: term.of === "image" ? "image" : "text", weight };
  });
  const request = { terms, gallery: shown.gallery, top_k: shown.topK };
  if (shown.minScore > LEAST) request.min_score = shown.minScore;
  return request;
}

function ask(delay) {
  clearTimeout(timer);
  const request = JSON.stringify(requestOf(state));
  if (request === asked) return;
  timer = setTimeout(() => answer(request), delay);
}

async function answer(request) {
  asked = request;
  waiting?.abort();
  const message = JSON.parse(request);
  const own = state.terms.filter((term) => term.kind === "upload").map((term) => term.value);
  if (!message.terms.length) {
    waiting = null;
    showRefusal();
    showStart();
    return;
  }
  const controller = new AbortController();
  waiting = controller;
  document.body.classList.add("busy");
  try {
    const headers = { "Content-Type": "application/json" };
    const found = await fetchJson("api/search", { method: "POST", headers, body: request, signal: controller.signal });
    if (waiting !== controller) return; // a later query is under way
    for (const key of own) uploads.get(key).isTaken = true;
    showRefusal();
    showHits(found, message);
  } catch (error) {
    if (error.name === "AbortError" || waiting !== controller) return;
    asked = "";
    if (error.status === 400 && takeOut(own)) {
      refused = error.message;
      ask(0);
      return;
    }
    showHits({ hits: [] }, message);
    byId("status").textContent = "";
    showError(error.message);
  } finally {
    if (waiting === controller) document.body.classList.remove("busy");
  }
}

function showRefusal() {
  showError(refused);
  refused = "";
}

/* Takes the images out of the query that no answer was given for yet; whether there were any. */
function takeOut(own) {
  const keys = own.filter((key) => !uploads.get(key)?.isTaken);
  for (const key of keys) uploads.set(key, null);
  if (!keys.length) return false;
  state = { ...state, terms: state.terms.filter((term) => !keys.includes(term.value)) };
  writeAddress(true);
  show();
  return true;
}

/* ---- what is shown ---- */

function show() {
  const isMap = state.view === "map";
  byId("search-view").hidden = isMap;
  byId("map-view").hidden = !isMap;
  for (const [name, shown] of [["search", !isMap], ["map", isMap]]) {
    const link = byId(`show-${name}`);
    link.href = addressOf({ ...state, view: name, open: null });
    if (shown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const box = byId("text");
  if (box.value !== state.text) box.value = state.text;
  const isMinus = state.sign === "-";
  const isEmpty = !state.text.trim();
  byId("sign").hidden = !isMinus;
  box.placeholder = isMinus ? "What the hits are not to show" : placeholder();
  box.setAttribute("aria-label", isMinus ? "Term to subtract" : "Query");
  byId("add").disabled = isEmpty && !isMinus;
  byId("subtract").disabled = isEmpty && (isMinus || !state.terms.length);
  showChips();
  for (const radio of document.getElementsByName("gallery")) radio.checked = radio.value === state.gallery;
  byId("top-k").value = state.topK;
  byId("top-k-value").textContent = state.topK;
  byId("min-score").value = state.minScore;
  const least = state.minScore > LEAST ? state.minScore.toFixed(2) : "any";
  byId("min-score-value").textContent = least;
  byId("min-score").setAttribute("aria-valuetext", least);
  if (isMap) showMap();
  showItem();
}

function showChips() {
  const chips = state.terms.map((term, index) => {
    const chip = element("li", term.sign === "-" ? "chip minus" : "chip");
    const sign = element("button", "sign", term.sign === "-" ? "−" : "+");
    const label = labelOf(term);
    sign.type = "button";
    sign.title = term.sign === "-" ? "Subtracted; add it instead" : "Added; subtract it instead";
    sign.setAttribute("aria-label", `${sign.title}: ${label.slice(0, 60)}`);
    sign.addEventListener("click", () => changeTerm(index, { ...term, sign: term.sign === "-" ? "+" : "-" }, ".sign"));
    chip.append(sign);
    const address = term.kind === "upload" ? uploads.get(term.value).url
      : term.kind === "item" && term.of === "image" ? thumbnail(term.value) : null;
    if (address) chip.append(picture(address, ""));
    const text = element("span", "label", label);
    text.dir = "auto";
    text.title = label.slice(0, 300);
    const remove = element("button", "remove", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${label.slice(0, 60)}`);
    remove.addEventListener("click", () => changeTerm(index, null, ".remove"));
    chip.append(text, remove);
    return chip;
  });
  byId("chips").replaceChildren(...chips);
  byId("chips").hidden = !chips.length;
  const own = state.terms.some((term) => term.kind === "upload")
    ? "An image of your own is not part of the address: a link to this page has the other terms only." : "";
  byId("note").textContent = notice || own;
  byId("note").hidden = !byId("note").textContent;
}

/* Replaces a term, or removes it, and puts the focus on the same button of what stands there then. */
function changeTerm(index, term, selector) {
  const terms = [...state.terms];
  terms.splice(index, 1, ...(term ? [term] : []));
  go({ terms });
  const chips = byId("chips").children;
  const next = chips[Math.min(index, chips.length - 1)];
  (next ? next.querySelector(selector) : byId("text")).focus();
}

function picture(address, text) {
  const image = element("img");
  image.src = address;
  image.alt = text;
  image.draggable = false;
  image.addEventListener("error", () => image.classList.add("missing"));
  return image;
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

function showStart() {
  document.body.classList.remove("busy");
  hits = info.sample.map((id) => ({ id, kind: "image", captions: [], image: id }));
  byId("status").textContent = "";
  byId("start").hidden = false;
  byId("sample-title").hidden = !hits.length;
  drawGrid();
}

function showHits(found, message) {
  hits = found.hits.map((hit) => ({ ...hit, kind: message.gallery }));
  byId("start").hidden = true;
  const noun = nounOf(message.gallery);
  let text = plural(hits.length, noun);
  if (hits.length) {
    text += `, score ${scoreOf(hits[0].score)} to ${scoreOf(hits[hits.length - 1].score)}`;
  } else {
    text = `No ${noun}s.`;
    if (found.best_score != null) {
      let digits = 3; // more where the two would look the same
      while (digits < 9 && scoreOf(found.best_score, digits) === scoreOf(message.min_score, digits)) digits += 1;
      text = `No ${noun} scores ${scoreOf(message.min_score, digits)} or more; the best scores ${scoreOf(found.best_score, digits)}. Lower the minimum score.`;
    }
  }
  if (message.terms.every((term) => term.weight < 0)) text += " · all terms are subtracted: these are the least similar";
  if (found.note) text += ` · ${found.note}`;
  byId("status").textContent = text;
  drawGrid();
}

function drawGrid() {
  const list = byId("results");
  const had = list.contains(document.activeElement);
  list.className = hits.length && hits[0].kind === "text" ? "lines" : "grid";
  list.replaceChildren(...hits.map(card));
  if (had) (list.querySelector("button") ?? list).focus();
  if (shownItem) showFacts();
}

function card(hit, index) {
  const entry = element("li");
  const button = element("button", "card");
  button.type = "button";
  button.tabIndex = index === 0 ? 0 : -1;
  button.dataset.id = hit.id;
  const caption = hit.captions[0] ?? "";
  if (hit.image) {
    const frame = element("span", "frame");
    frame.append(picture(thumbnail(hit.image), hit.kind === "image" ? caption || nameOf(hit.id) : ""));
    button.append(frame);
  }
  const facts = element("span", "facts");
  if (hit.score !== undefined) {
    const score = element("span", "score");
    const bar = element("span", "bar");
    const filled = element("span");
    filled.style.width = `${100 * Math.min(Math.max(hit.score, 0), 1)}%`;
    bar.append(filled);
    score.append(bar, element("span", "number", scoreOf(hit.score)));
    facts.append(score);
  }
  const text = element("span", "caption", caption || (hit.score === undefined ? "" : nameOf(hit.id)));
  text.dir = "auto";
  if (text.textContent) facts.append(text);
  if (hit.same?.length) facts.append(element("span", "same", `and ${hit.same.length} like it`));
  if (facts.childNodes.length) button.append(facts);
  button.addEventListener("click", () => {
    opener = hit.id;
    go({ open: { kind: hit.kind, id: hit.id } });
  });
  button.addEventListener("focus", () => {
    for (const other of byId("results").querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
  });
  entry.append(button);
  return entry;
}

/* ---- one item ---- */

async function showItem() {
  const dialog = byId("item");
  if (!state.open) {
    if (dialog.open) dialog.close();
    shownItem = null;
    return;
  }
  const wanted = state.open;
  if (shownItem && shownItem.id === wanted.id && shownItem.kind === wanted.kind && dialog.open) return;
  let item;
  try {
    item = await fetchJson(`api/items/${wanted.kind}?id=${encodeURIComponent(wanted.id)}`);
  } catch (error) {
    if (state.open !== wanted) return;
    state = { ...state, open: null };
    writeAddress(true);
    showError(error.message);
    show();
    return;
  }
  if (state.open !== wanted) return; // another one was opened meanwhile
  shownItem = item;
  const image = byId("item-image");
  image.parentElement.hidden = !item.image;
  if (item.image) {
    image.src = `api/items/image/view?id=${encodeURIComponent(item.image)}&stamp=${info.stamp}`;
    image.alt = item.captions[0] ?? item.path;
  } else {
    image.removeAttribute("src");
  }
  const title = byId("item-title");
  title.textContent = item.kind === "text" ? item.captions[0] : item.path.slice(item.path.lastIndexOf("/") + 1);
  title.className = item.kind === "text" ? "" : "file";
  title.dir = "auto";
  showFacts();
  const captions = item.kind === "image" ? item.captions : [];
  byId("item-captions").replaceChildren(...captions.map(captionEntry));
  byId("item-captions").hidden = !captions.length;
  byId("item-add").disabled = byId("item-subtract").disabled = isFull();
  if (!dialog.open) dialog.showModal();
  byId("search-by").focus({ preventScroll: true });
}

/* The rank and score of the item in the dialog, where it is a hit, and what else is known of it. */
function showFacts() {
  const item = shownItem;
  const hit = hits.find((other) => other.id === item.id && other.kind === item.kind);
  const facts = [];
  if (hit?.score !== undefined) facts.push(`hit ${hit.rank}`, `score ${scoreOf(hit.score)}`);
  if (item.split) facts.push(`split ${item.split}`);
  if (item.path && (item.kind === "text" || item.path.includes("/"))) facts.push(item.path);
  if (hit?.same?.length) facts.push(`looks the same: ${hit.same.slice(0, 5).map(nameOf).join(", ")}`);
  byId("item-facts").textContent = facts.join(" · ");
  byId("item-facts").hidden = !facts.length;
}

function captionEntry(caption) {
  const entry = element("li");
  if (info.takes.text) {
    entry.textContent = caption;
  } else {
    const link = element("button", "link", caption);
    link.type = "button";
    link.title = "Search by this caption";
    link.addEventListener("click", () => {
      go({ text: caption, sign: "+", terms: [], open: null, view: "search" });
      byId("text").focus();
    });
    entry.append(link);
  }
  entry.dir = "auto";
  return entry;
}

const isFull = () => state.terms.length >= MOST_TERMS;
const itemTerm = (sign) => ({ sign, kind: "item", of: nounOf(shownItem.kind), value: shownItem.id });

function useItem(terms, text) {
  go({ terms, text, sign: text ? state.sign : "+", open: null, view: "search" });
  byId("results").focus();
  window.scrollTo(0, 0);
}

byId("search-by").addEventListener("click", () => useItem([itemTerm("+")], ""));
byId("item-add").addEventListener("click", () => useItem([...state.terms, itemTerm("+")], state.text));
byId("item-subtract").addEventListener("click", () => useItem([...state.terms, itemTerm("-")], state.text));
/* A small image is shown at twice its own size at most. */
byId("item-image").addEventListener("load", () => {
  const image = byId("item-image");
  image.style.setProperty("--widest", `${2 * image.naturalWidth}px`);
  image.style.setProperty("--highest", `${2 * image.naturalHeight}px`);
});
byId("close").addEventListener("click", () => closeItem());
byId("item").addEventListener("cancel", (event) => {
  event.preventDefault();
  closeItem();
});
byId("item").addEventListener("click", (event) => {
  if (event.target === byId("item")) closeItem(); // beside the dialog's content
});

function closeItem() {
  go({ open: null });
  const cards = [...byId("results").querySelectorAll("button")];
  const focused = cards.find((button) => button.dataset.id === opener) ?? cards[0];
  if (state.view === "search") focused?.focus();
  else byId("map").querySelector(".map-view")?.focus();
}

/* Opens the hit beside the one that is open. */
function step(offset) {
  const index = hits.findIndex((hit) => hit.id === state.open.id && hit.kind === state.open.kind);
  const next = hits[index + offset];
  if (index < 0 || !next) return;
  opener = next.id;
  state = { ...state, open: { kind: next.kind, id: next.id } };
  writeAddress(true);
  showItem();
}

/* ---- images of the user's own ---- */

async function takeImage(file) {
  if (!file || !state) return;
  if (info.takes.image) {
    showError(`Images cannot be searched by here: ${info.takes.image}`);
    return;
  }
  if (isFull()) {
    showError("The query has as many terms as it can have; remove one.");
    return;
  }
  showError("");
  try {
    const small = await shrunk(file);
    const key = `${Date.now()}-${uploads.size}`;
    const [base64, sha256] = await Promise.all([base64Of(small), sha256Of(file)]);
    uploads.set(key, { name: file.name || "pasted image", url: URL.createObjectURL(small), base64, sha256 });
    go({ terms: [...state.terms, { sign: "+", kind: "upload", value: key }], open: null, view: "search" });
  } catch (error) {
    showError(error.message);
  }
}

/* The image as a JPEG of at most UPLOAD_SIZE pixels; as it is where the browser cannot decode it and the server may. */
async function shrunk(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    if (file.size > 8 * 2 ** 20) throw new Error("This image has more than 8 MiB and cannot be made smaller here.");
    return file;
  }
  const scale = Math.min(1, UPLOAD_SIZE / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; // behind transparent pixels
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => {
    canvas.toBlob((blob) => resolve(blob ?? file), "image/jpeg", 0.92);
  });
}

/* The SHA-256 of a file, by which the gallery's own copy of it is known; browsers tell it to safe addresses alone. */
async function sha256Of(file) {
  if (!window.crypto?.subtle) return null;
  const digest = await crypto.subtle.digest("SHA-256", await file.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function base64Of(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result.slice(reader.result.indexOf(",") + 1)));
    reader.addEventListener("error", () => reject(new Error("The file cannot be read.")));
    reader.readAsDataURL(blob);
  });
}

const firstFile = (files) => [...files].find((file) => file.type.startsWith("image/")) ?? files[0];
byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", () => {
  takeImage(byId("file").files[0]);
  byId("file").value = "";
});
document.addEventListener("paste", (event) => {
  const files = event.clipboardData?.files;
  if (!files?.length) return;
  event.preventDefault();
  takeImage(firstFile(files));
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    byId("drop").hidden = false;
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  byId("drop").hidden = true;
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  takeImage(firstFile(event.dataTransfer.files));
});

/* ---- the map ---- */

async function showMap() {
  if (map) return;
  map = "asked for";
  byId("map-status").textContent = "Drawing the map …";
  try {
    for (;;) {
      const data = await fetchJson("api/map");
      drawMap(data);
      if (data.is_complete) break;
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  } catch (error) {
    map = null;
    byId("map-status").textContent = error.message;
  }
}

function drawMap(data) {
  if (map !== "asked for" && !data.is_complete) return; // still the same points
  const shown = data.images < data.of ? `A sample of ${data.images.toLocaleString("en")} of the ${plural(data.of, "image")}`
    : plural(data.images, "image");
  const captions = data.points.length - data.images;
  const each = captions === data.images ? ", with a caption each" : captions ? `, and ${plural(captions, "caption")}` : "";
  const more = data.is_complete ? "" : " t-SNE is being computed; this is PCA.";
  byId("map-status").textContent = `${shown}${each}.${more}`;
  if (map !== "asked for") {
    map.setData(data);
    return;
  }
  map = window.onceoverMap(byId("map"), data, {
    onselect(point) {
      opener = null;
      go({ open: { kind: point.kind === "image" ? "image" : "text", id: point.id.slice(point.id.indexOf(":") + 1) } });
    },
  });
}

/* ---- controls and keys ---- */

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!state) return;
  typing = "";
  ask(0);
});
byId("text").addEventListener("input", () => go({ text: byId("text").value }, { goesOn: "text" }));
/* Both buttons keep the text in the box as a term, with its own sign, and empty the box for a further one. */
for (const [name, sign] of [["add", "+"], ["subtract", "-"]]) {
  byId(name).addEventListener("click", () => {
    const text = state.text.trim();
    if (text && isFull()) {
      showError("The query has as many terms as it can have; remove one.");
      return;
    }
    const terms = text ? [...state.terms, { sign: state.sign, kind: "text", value: text }] : state.terms;
    go({ text: "", sign, terms });
    byId("text").focus();
  });
}
for (const radio of document.getElementsByName("gallery")) {
  radio.addEventListener("change", () => go({ gallery: radio.value }));
}
byId("top-k").addEventListener("input", () => go({ topK: Number(byId("top-k").value) }, { goesOn: "top-k" }));
byId("min-score").addEventListener("input", () => go({ minScore: Number(byId("min-score").value) }, { goesOn: "min-score" }));
for (const name of ["search", "map"]) {
  byId(`show-${name}`).addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // in a tab of its own
    event.preventDefault();
    go({ view: name, open: null });
  });
}
byId("home").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go({ text: "", sign: "+", terms: [], open: null, view: "search" });
  byId("text").focus();
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  const target = state?.view === "map" ? byId("map").querySelector(".map-view") : byId("results").querySelector("button");
  (target ?? byId("results")).focus();
});

/* How many cards stand beside each other. */
function columns(cards) {
  const top = cards[0].getBoundingClientRect().top;
  const next = cards.findIndex((other) => other.getBoundingClientRect().top > top + 4);
  return next < 0 ? cards.length : next;
}

function moveInGrid(event) {
  const cards = [...byId("results").querySelectorAll("button")];
  const index = cards.indexOf(document.activeElement);
  if (index < 0) return;
  const row = columns(cards);
  const targets = {
    ArrowLeft: index - 1,
    ArrowRight: index + 1,
    ArrowUp: index - row,
    ArrowDown: index + row,
    Home: 0,
    End: cards.length - 1,
  };
  if (event.key === "Escape" || (event.key === "ArrowUp" && index < row)) {
    event.preventDefault();
    byId("text").focus();
    return;
  }
  const target = cards[targets[event.key]];
  if (!target) return;
  event.preventDefault();
  target.focus();
}

document.addEventListener("keydown", (event) => {
  if (!state || event.altKey || event.ctrlKey || event.metaKey || event.isComposing) return;
  const active = document.activeElement;
  if (byId("item").open) {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  } else if (event.key === "/" && !active.matches("input, select, textarea")) {
    event.preventDefault();
    if (state.view !== "search") go({ view: "search" });
    byId("text").focus();
    byId("text").select();
  } else if (active === byId("text") && event.key === "ArrowDown") {
    const first = byId("results").querySelector("button");
    if (!first) return;
    event.preventDefault();
    first.focus();
  } else if (active === byId("text") && event.key === "Escape") {
    event.preventDefault();
    if (state.text || state.sign === "-") go({ text: "", sign: "+" });
  } else if (byId("results").contains(active)) {
    moveInGrid(event);
  }
});

/* ---- the beginning ---- */

function showInfo() {
  const sizes = info.galleries.map((gallery) => plural(gallery.size, nounOf(gallery.kind)));
  byId("name").textContent = `${info.name} · ${sizes.join(", ")}`;
  byId("gallery").hidden = info.galleries.length < 2;
  byId("show-map").hidden = !has("image");
  byId("choose").hidden = Boolean(info.takes.image);
  if (info.takes.text) {
    byId("text").disabled = true;
    for (const button of ["add", "subtract"]) byId(button).hidden = true;
  }
  const examples = info.takes.text ? [] : info.examples;
  byId("examples").replaceChildren();
  if (!examples.length) return;
  byId("examples").append("Try ");
  examples.forEach((example) => {
    const button = element("button", "example", example);
    button.type = "button";
    button.dir = "auto";
    button.addEventListener("click", () => {
      go({ text: example, sign: "+" });
      byId("text").focus();
    });
    byId("examples").append(button, " ");
  });
}

function placeholder() {
  if (info.takes.text) return "Texts cannot be searched by here; choose an item";
  const isWide = matchMedia("(min-width: 40rem)").matches;
  return has("image") && isWide ? "Describe an image, or drop one here" : "Describe an image";
}

/* The sliders are folded away in a narrow window. */
const wide = matchMedia("(min-width: 40rem)");
const unfold = () => {
  byId("more").open = wide.matches;
};
wide.addEventListener("change", unfold);
unfold();

async function begin() {
  while (!info) {
    try {
      info = await fetchJson("api/info");
    } catch (error) {
      showError(`${error.message} Trying again …`);
      await new Promise((resolve) => setTimeout(resolve, RETRY));
    }
  }
  showError("");
  showInfo();
  state = restored();
  byId("form").inert = false;
  document.title = titleOf(state);
  show();
  ask(0);
  if (state.view === "search" && !state.open && matchMedia("(hover: hover)").matches) byId("text").focus();
}

begin();
