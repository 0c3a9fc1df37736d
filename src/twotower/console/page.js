// The page: one user's recommendations and history, and what a click changes.
// Everything shown comes from logs and catalogues, so it enters the page as text and never as markup.
"use strict";

const POLL_MS = 3000;
const PATIENCE_MS = 15000;
const HISTORY = 30;
const SIMILAR = 8;
const HOURS = 24; // of recall that are drawn
const CHANNEL_COLOURS = 9;
const LONGEST_LIST = 6;
const PAGE = "page"; // the list that the whole funnel gives

const $ = (id) => document.getElementById(id);

const state = {
  meta: null,
  user: null,
  channel: "",
  load: 0, // number of the latest load: answers of earlier ones are dropped
  shown: [], // item ids of the list as shown, best first
  clickTimes: new Set(), // clicks of the history as shown
  served: null,
  delta: 0, // number of the latest delta over the served version
  waiting: false, // a click was made here that no delta has learned yet
  createdMs: null,
  refusal: null,
};

// ---------------------------------------------------------------- talking to the server

class Problem extends Error {}

/** Ids are 64-bit integers where they are numbers: those that JavaScript would round are read and written exactly. */
function parse(text) {
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) && context?.source
      ? BigInt(context.source)
      : value);
}

function write(content) {
  return JSON.stringify(content, (_, value) => (typeof value === "bigint" ? JSON.rawJSON(String(value)) : value));
}

/** Ask the server; gives the answer and how long it took. */
async function ask(path, body) {
  const options = { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", headers: { "Content-Type": "application/json" }, body: write(body) });
  }
  const started = performance.now();
  let response, text;
  try {
    response = await fetch(path, options);
    text = await response.text();
  } catch (error) {
    throw new Problem(error.name === "TimeoutError"
      ? `The server gave no answer within ${PATIENCE_MS / 1000} seconds.`
      : "The server does not answer. Is it still running?");
  }
  const tookMs = performance.now() - started;
  let content;
  try {
    content = parse(text);
  } catch {
    throw new Problem(`The server answered ${response.status} with something other than JSON.`);
  }
  if (!response.ok) {
    const reason = content?.error ?? "no reason given";
    throw new Problem(response.status < 500
      ? `The server refused the request (${response.status}): ${reason}`
      : `The server could not answer (${response.status}): ${reason}`);
  }
  return { content, tookMs };
}

// ---------------------------------------------------------------- building blocks

/** An element with classes and children; a string child is text. */
function el(name, classes, ...children) {
  const element = document.createElement(name);
  if (classes) element.className = classes;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function button(label, classes, onClick) {
  const element = el("button", classes, label);
  element.type = "button";
  element.addEventListener("click", onClick);
  return element;
}

const plural = (count, one, many = `${one}s`) => `${count.toLocaleString()} ${count === 1 ? one : many}`;
const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
const absolute = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium" });
const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });

function ago(tsMs) {
  const seconds = (tsMs - Date.now()) / 1000;
  const size = Math.abs(seconds);
  if (size < 10) return "just now";
  for (const [unit, length, until] of [["second", 1, 60], ["minute", 60, 3600], ["hour", 3600, 86400], ["day", 86400, 30 * 86400], ["month", 30.44 * 86400, 365 * 86400]]) {
    if (size < until) return relative.format(Math.round(seconds / length), unit);
  }
  return relative.format(Math.round(seconds / (365.25 * 86400)), "year");
}

/** When a click was: lately as a distance, else as a date. */
const moment = (tsMs) => (Date.now() - tsMs < 7 * 86400 * 1000 ? ago(tsMs) : day.format(new Date(tsMs)));

function timeOf(tsMs, text) {
  const date = new Date(tsMs);
  const element = el("time", "", text);
  element.dateTime = date.toISOString();
  element.title = absolute.format(date);
  return element;
}

const listOf = (value) =>
  (Array.isArray(value) ? value : String(value).split("|")).map(String).filter((part) => part !== "");

/** An attribute as people read it: words alone, numbers with their name. */
function attribute(name, value) {
  if (value === null || value === undefined || value === "" || (Array.isArray(value) && !value.length)) return null;
  const element = el("span");
  element.title = name;
  if (typeof value === "string" || Array.isArray(value)) {
    const parts = listOf(value);
    element.append(parts.slice(0, LONGEST_LIST).join(", ") + (parts.length > LONGEST_LIST ? ", …" : ""));
  } else {
    const number = typeof value === "number" && !Number.isInteger(value) ? value.toFixed(2) : String(value);
    element.className = "number";
    element.append(`${name.replaceAll("_", " ")} ${number}`);
  }
  return element;
}

function body(item) {
  const attributes = item.attributes
    ? Object.entries(item.attributes).map(([name, value]) => attribute(name, value))
    : [el("span", "", "not in this version")];
  const title = el("div", "title", String(item.title ?? item.item_id));
  title.title = `item ${item.item_id}`;
  return el("div", "", title, el("div", "meta", ...attributes.filter(Boolean).flatMap((part) => [part, " "])));
}

function channelTag(name) {
  const place = state.meta.channels.indexOf(name);
  return el("span", `channel channel-${place < 0 ? 0 : place % CHANNEL_COLOURS}`, name);
}

function say(element, text) {
  element.textContent = text;
  element.hidden = text === "";
}

function notice(text, classes) {
  const line = el("div", `notice ${classes}`, el("span", "", text));
  line.append(button("Dismiss", "plain", () => line.remove()));
  $("notices").append(line);
  return line;
}

// ---------------------------------------------------------------- the served version

async function poll() {
  try {
    const { content, tookMs } = await ask("/v1/version");
    showServed(content, tookMs);
    if (!state.meta) await start();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    $("state").dataset.state = "down";
    $("state").textContent = "no answer";
    $("state").title = `${error.message} Trying again every ${POLL_MS / 1000} seconds.`;
    if (!state.meta) say($("problem"), `${error.message} Trying again every ${POLL_MS / 1000} seconds.`);
  } finally {
    setTimeout(poll, POLL_MS);
  }
}

function showServed(version, tookMs) {
  const before = state.served;
  const recovered = $("state").dataset.state === "down";
  state.served = version.version;
  state.createdMs = version.created_ms;
  $("state").dataset.state = "live";
  if ($("state").textContent !== "live") $("state").textContent = "live";
  $("state").title = `The server answered in ${milliseconds(tookMs)}.`;
  $("version").textContent = version.version;
  $("delta").textContent = String(version.delta_seq);
  const learned = before === version.version && version.delta_seq > state.delta && state.waiting;
  state.delta = version.delta_seq;
  $("made").replaceChildren("made ", timeOf(version.created_ms, ago(version.created_ms)), ` (${absolute.format(new Date(version.created_ms))})`);
  const refusal = version.refused ? `${version.refused.version}\n${version.refused.problem}` : null;
  if (refusal !== state.refusal) {
    document.querySelectorAll(".notice.refused").forEach((line) => line.remove());
    if (refusal) {
      const reason = version.refused.problem.replace(/\.$/, "");
      notice(`Version ${version.refused.version} was refused: ${reason}. Version ${version.version} stays live.`, "refused");
    }
    state.refusal = refusal;
  }
  if (before !== null && before !== version.version) {
    document.querySelectorAll(".notice.switched").forEach((line) => line.remove());
    notice(`Version ${version.version} is live in place of ${before}. The lists below are loaded again.`, "switched");
    renew();
  } else if (recovered && state.meta && !$("problem").hidden) {
    load(null);
  } else if (learned) {
    state.waiting = false;
    load(`delta ${version.delta_seq}, which learned from the click`);
  }
  for (const time of document.querySelectorAll(".side time")) time.textContent = moment(Date.parse(time.dateTime));
  showLearning(version.monitors);
}

/** How well what is served learns from clicks; nothing before the first delta. */
function showLearning(monitors) {
  const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
  $("learning").hidden = state.delta === 0;
  $("freshness").textContent = monitors.freshness_s === null ? "–" : lasted(monitors.freshness_s);
  $("freshness").title = "Age of the latest click that was learned";
  $("unknown-users").textContent = share(monitors.unknown_user_share);
  $("unknown-items").textContent = share(monitors.unknown_item_share);
  $("drift").textContent = monitors.popularity_drift === null ? "–" : monitors.popularity_drift.toFixed(2);
  $("drift").title = "How far the latest clicks are from those of the version: 0 = alike, 1 = nothing in common";
  $("gated").textContent = String(monitors.gated);
  $("hours").replaceChildren(...monitors.recall_next.slice(-HOURS).map((hour) => {
    const line = document.createElement("li");
    const at = new Date(hour.ts_ms);
    line.style.setProperty("--share", String(hour.recall));
    line.title = `${absolute.format(at)}: ${share(hour.recall)} of ${hour.positives}`;
    line.append(`${String(at.getHours()).padStart(2, "0")} h `, Object.assign(document.createElement("b"), { textContent: hour.recall.toFixed(2) }));
    return line;
  }));
}

/** Seconds in words. */
function lasted(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

/** Another version is live: its channels and types may differ. */
async function renew() {
  await guarded(async () => {
    state.meta = (await ask("/console/meta")).content;
    showChannels();
    await load("the switch of versions");
  });
}

// ---------------------------------------------------------------- the user

async function start() {
  const [meta, users] = await Promise.all([ask("/console/meta"), ask("/console/users?n=14")]);
  state.meta = meta.content;
  say($("problem"), "");
  showChannels();
  $("user-input").inputMode = state.meta.user_id_type === "int" ? "numeric" : "text";
  $("users").replaceChildren(...users.content.users.map((id) => {
    const chip = el("a", "user-chip", String(id));
    chip.href = `?user=${encodeURIComponent(id)}`;
    chip.addEventListener("click", (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey) return;
      event.preventDefault();
      choose(String(id));
    });
    return chip;
  }));
  const asked = new URLSearchParams(location.search).get("user") || users.content.users[0];
  if (asked !== undefined) choose(String(asked), false);
}

/** The id that a text means, in the type of the version's users; a sentence where it means none. */
function userId(text) {
  if (state.meta.user_id_type !== "int") return text;
  if (!/^-?\d{1,19}$/.test(text) || BigInt.asIntN(64, BigInt(text)) !== BigInt(text)) {
    throw new Problem(`User ids are whole numbers here, and “${text}” is none.`);
  }
  const number = Number(text);
  return Number.isSafeInteger(number) ? number : BigInt(text);
}

/** An id that nobody has, for someone of whom nothing is known. */
function anonymous() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  if (state.meta.user_id_type === "int") return String(2 ** 51 + (high % 2 ** 19) * 2 ** 32 + low);
  return `anonymous-${high.toString(36)}${low.toString(36)}`;
}

function choose(text, remember = true) {
  let id;
  try {
    id = userId(text.trim());
  } catch (error) {
    $("user-error").textContent = error.message;
    $("user-input").setAttribute("aria-invalid", "true");
    $("user-input").value = text;
    return;
  }
  $("user-error").textContent = "";
  $("user-input").removeAttribute("aria-invalid");
  state.user = id;
  state.shown = [];
  state.clickTimes = new Set();
  $("user-input").value = String(id);
  if (remember) history.pushState(null, "", `?user=${encodeURIComponent(String(id))}`);
  document.title = `${id} · twotower`;
  for (const chip of $("users").children) chip.setAttribute("aria-current", String(chip.textContent === String(id)));
  $("user-title").textContent = `User ${id}`;
  $("user-about").textContent = "";
  load(null);
}

/** The lists as one control: the fused one, the channels (a legend of their colours), and the page of the funnel. */
function showChannels() {
  const names = ["", ...state.meta.channels, PAGE];
  if (!names.includes(state.channel)) state.channel = "";
  $("channels").replaceChildren($("channels").querySelector("legend"), ...names.map((name) => segment("channel", name, name === state.channel, () => {
    state.channel = name;
    state.shown = [];
    load(null);
  })));
}

/** One of several lists to choose from: a channel's, the funnel's page, or with an empty name the fused one. */
function segment(group, name, checked, onChange) {
  const input = el("input");
  Object.assign(input, { type: "radio", name: group, value: name, checked });
  input.addEventListener("change", onChange);
  return el("label", "", input, name && name !== PAGE ? channelTag(name) : name || "fused", el("span", "tally"));
}

/** How many items of the list each channel brought; of a list of one channel that goes without saying. */
function showTallies(items, failed) {
  for (const label of $("channels").querySelectorAll("label")) {
    const name = label.querySelector("input").value;
    const tally = label.querySelector(".tally");
    const brought = items.filter((item) => item.channels.includes(name)).length;
    const told = state.meta.channels.includes(name) && (!state.channel || state.channel === PAGE);
    label.classList.toggle("failed", failed.includes(name));
    label.title = failed.includes(name)
      ? `${name} failed or was too slow, and was left out`
      : told ? `${name} brought ${brought} of these ${plural(items.length, "item")}` : "";
    tally.textContent = failed.includes(name) ? "left out" : told ? String(brought) : "";
  }
}

// ---------------------------------------------------------------- history and recommendations

/** Run something that asks the server; a failure becomes a sentence on the page. */
async function guarded(work) {
  try {
    await work();
    return true;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    say($("problem"), error.message);
    return false;
  }
}

/** Load both lists; `cause` says what may have changed them since they were shown, null shows them afresh. */
async function load(cause) {
  if (state.user === null) return;
  const mine = ++state.load;
  const { user, channel } = state;
  $("columns").setAttribute("aria-busy", "true");
  $("columns").inert = true;
  const loaded = await guarded(async () => {
    const [clicks, answer] = await Promise.all([
      ask(`/console/history?n=${HISTORY}&user_id=${encodeURIComponent(String(user))}`),
      channel === PAGE // a page that people look at again is to be the same: what was shown on it stays
        ? ask("/v1/recommend", { user_id: user, k: Number($("k").value), exclude: "clicked" })
        : ask("/v1/retrieve", { user_id: user, k: Number($("k").value), channels: channel ? [channel] : [] }),
    ]);
    const items = await describe(answer.content.items);
    if (mine !== state.load) return;
    say($("problem"), "");
    $("columns").hidden = false;
    showHistory(clicks, cause !== null);
    showRecommendations(answer, user, items, cause);
  });
  if (mine !== state.load) return;
  if (!loaded) clear();
  $("columns").removeAttribute("aria-busy");
  $("columns").inert = false;
}

/** Show no list rather than one that is not what was asked for. */
function clear() {
  state.shown = [];
  for (const id of ["history-items", "recommendation-items"]) $(id).replaceChildren();
  for (const id of ["history-count", "history-took", "recommendations-count", "recommendations-took"]) $(id).textContent = "";
  for (const id of ["change", "history-empty", "recommendations-empty"]) say($(id), "");
}

/** Candidates with their titles and attributes. */
async function describe(candidates) {
  if (!candidates.length) return [];
  const { content } = await ask("/console/items", { ids: candidates.map((item) => item.item_id) });
  return candidates.map((item, place) => ({ ...content.items[place], ...item }));
}

function showHistory({ content, tookMs }, again) {
  const { clicks, since_version: live, items, known } = content;
  $("user-about").textContent = known
    ? `Known to this version by ${plural(clicks - live, "click")}` + (live ? `; ${plural(live, "live click")} since.` : ".")
    : "Unknown to this version" + (live ? `; ${plural(live, "live click")} since.` : ".");
  $("history-count").textContent = clicks > items.length ? `latest ${items.length} of ${plural(clicks, "click")}` : plural(clicks, "click");
  $("history-took").textContent = milliseconds(tookMs);
  const key = (item) => `${item.ts_ms}/${item.item_id}`;
  const before = state.clickTimes;
  state.clickTimes = new Set(items.map(key));
  $("history-items").replaceChildren(...items.map((item) => {
    const row = el("li", "item",
      body(item),
      el("div", "side",
        item.ts_ms === null ? null : timeOf(item.ts_ms, moment(item.ts_ms)),
        item.since_version ? el("span", "tag", "live") : null));
    row.dataset.item = String(item.item_id);
    if (item.since_version) {
      row.classList.add("live");
      row.title = "Clicked after the data that this version was made from";
    }
    if (again && !before.has(key(item))) row.classList.add("fresh");
    return row;
  }));
  say($("history-empty"), items.length ? "" : "No clicks yet. Recommendations come from what is popular and from features; the first click counts at once.");
}

function showRecommendations({ content, tookMs }, user, items, cause) {
  const ids = items.map((item) => String(item.item_id));
  const before = new Map(state.shown.map((id, place) => [id, place]));
  const compared = cause !== null && before.size > 0;
  const entered = ids.filter((id) => !before.has(id)).length;
  const left = [...before.keys()].filter((id) => !ids.includes(id)).length;
  const moved = ids.filter((id, place) => before.has(id) && before.get(id) !== place).length;
  state.shown = ids;

  $("recommendations-count").textContent = items.length < Number($("k").value) ? `${items.length} found` : "";
  $("recommendations-took").textContent = milliseconds(tookMs);
  $("recommendations-took").title = `POST ${content.request_id ? "/v1/recommend" : "/v1/retrieve"} as measured in this browser, version ${content.version}`;
  $("recommendation-items").replaceChildren(...items.map((item, place) => {
    const earlier = before.get(ids[place]);
    const isNew = compared && earlier === undefined;
    const row = el("li", "item",
      el("div", "rank", String(place + 1), isNew ? el("span", "moved new", "new") : compared ? shift(earlier - place) : null),
      el("div", "",
        body(item),
        el("div", "why", ...item.channels.map(channelTag), scoreOf(item.score), item.explored ? el("span", "tag", "explored") : null, el("code", "", ids[place]))),
      actions(item, user, content.request_id));
    row.dataset.item = ids[place];
    if (isNew) row.classList.add("fresh");
    return row;
  }));
  showTallies(items, content.failed_channels);
  say($("recommendations-empty"), items.length ? "" : "Nothing is left to recommend: this channel has no candidates for this user. Try another channel.");
  const parts = [];
  if (compared) {
    const counts = [entered && `${entered} entered`, left && `${left} left`, moved && `${moved} moved`].filter(Boolean);
    parts.push(`After ${cause}: ${counts.length ? counts.join(", ") : "the list is the same"}.`);
  }
  if (content.counts) {
    const { retrieved, pre_rank_rejected: early, rank_rejected: late, ranked_not_shown: room } = content.counts;
    parts.push(`Of ${plural(retrieved, "candidate")} the pre-ranker rejected ${early}, the ranker ${late}, and ${room} found no room.`);
  }
  if (content.failed_channels.length) parts.push(`Failed or too slow, and left out: ${content.failed_channels.join(", ")}.`);
  say($("change"), parts.join(" "));
}

function shift(places) {
  if (places === 0) return null;
  const element = el("span", `moved ${places > 0 ? "up" : "down"}`, `${places > 0 ? "▲" : "▼"}${Math.abs(places)}`);
  element.setAttribute("aria-label", `${places > 0 ? "up" : "down"} ${plural(Math.abs(places), "place")}`);
  element.setAttribute("role", "img");
  return element;
}

function scoreOf(score) {
  if (score === null) return null;
  return el("span", "score", `score ${score === 0 ? "0" : Number(score.toPrecision(3))}`);
}

function actions(item, user, requestId) {
  const name = String(item.title ?? item.item_id);
  const why = button("Why", "small", () => togglePanel(why, "explained", (panel) => explain(panel, user, item)));
  why.setAttribute("aria-expanded", "false");
  why.setAttribute("aria-label", `Why ${name}`);
  const like = button("Similar", "small", () => togglePanel(like, "similar", (panel) => showSimilar(panel, item)));
  like.setAttribute("aria-expanded", "false");
  like.setAttribute("aria-label", `Items similar to ${name}`);
  const click = button("Click", "small click", () => post(click, user, item, name, requestId));
  click.setAttribute("aria-label", `Click ${name} as this user`);
  return el("div", "actions", why, like, click);
}

/** Post a click of the user whose list it is, then load what it changed. */
async function post(pressed, user, item, name, requestId) {
  pressed.disabled = true;
  const event = { event_id: uuid(), type: "click", user_id: user, item_id: item.item_id, ts_ms: Date.now() };
  if (requestId) event.request_id = requestId;
  const posted = await guarded(() => ask("/v1/events", { events: [event] }));
  pressed.disabled = false;
  if (!posted) return;
  state.waiting = true;
  if (user !== state.user) return;
  await load(`the click on “${name}”`);
  $("recommendations").focus({ preventScroll: true });
}

/** A unique name; `crypto.randomUUID` is missing on plain http from another machine. */
function uuid() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Open or close a panel below an item; `fill` asks for what it shows, and its failure becomes a sentence in it. */
async function togglePanel(pressed, kind, fill) {
  const row = pressed.closest(".item");
  const open = row.querySelector(`.${kind}`);
  pressed.setAttribute("aria-expanded", String(!open));
  if (open) {
    open.remove();
    return;
  }
  const message = el("p", "message quiet", "Looking…");
  message.setAttribute("role", "status");
  const panel = el("div", `below ${kind}`, message);
  row.append(panel);
  try {
    await fill(panel);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    message.className = "message error";
    message.textContent = error.message;
  }
}

/** Why an item is, or is not, on this user's page: what each stage makes of it. */
async function explain(panel, user, item) {
  const { content, tookMs } = await ask("/v1/explain", {
    user_id: user, item_id: item.item_id, k: Math.min(Number($("k").value), 200), exclude: "clicked",
  });
  const stages = [...Object.entries(content.channels), ["fused", content.fused], ["pre-ranker", content.pre_rank], ["ranker", content.rank]];
  const lines = stages.filter(([, place]) => place !== null).map(([name, place]) => el("tr", "",
    el("th", "", state.meta.channels.includes(name) ? channelTag(name) : name),
    el("td", "", place.rank === null ? "not in its list" : `place ${place.rank.toLocaleString()}`),
    el("td", "", scoreOf(place.score))));
  const outcome = content.outcome.replaceAll("_", " ");
  panel.querySelector(".message").textContent = `In the funnel: ${outcome}, ${content.why}.`;
  panel.prepend(el("div", "below-head", el("span", "", "Where each channel and each stage has it"), el("span", "took", milliseconds(tookMs))));
  panel.append(el("table", "places", el("tbody", "", ...lines)));
}

/** Items like an item, as each channel sees them. */
async function showSimilar(panel, item) {
  const message = panel.querySelector(".message");
  const { content, tookMs } = await ask(`/v1/items/${encodeURIComponent(String(item.item_id))}/similar?k=${SIMILAR}`);
  panel.prepend(el("div", "below-head", el("span", "", "Similar items as each channel sees them"), el("span", "took", milliseconds(tookMs))));
  const lists = Object.entries(content.channels);
  const described = await describe(lists.flatMap(([, items]) => items));
  const by = new Map(); // the channels that have an item among its neighbours
  for (const [name, items] of lists) {
    for (const other of items) by.set(String(other.item_id), [...(by.get(String(other.item_id)) ?? []), name]);
  }
  const list = el("ol", "items");
  const show = (name) => {
    const at = lists.findIndex(([other]) => other === name);
    const start = lists.slice(0, at).reduce((sum, [, items]) => sum + items.length, 0);
    const items = described.slice(start, start + lists[at][1].length);
    say(message, items.length ? "" : `${name} has no item like this one.`);
    list.replaceChildren(...items.map((other) => {
      const channels = [name, ...by.get(String(other.item_id)).filter((also) => also !== name)];
      const line = el("li", "item", el("div", "",
        body(other),
        el("div", "why", ...channels.map(channelTag), scoreOf(other.score))));
      line.dataset.item = String(other.item_id);
      return line;
    }));
  };
  const group = `similar-${uuid()}`;
  const choice = el("fieldset", "segments", el("legend", "hidden", "Channel"),
    ...lists.map(([name], place) => segment(group, name, place === 0, () => show(name))));
  message.before(choice);
  panel.append(list);
  show(lists[0][0]);
}

// ---------------------------------------------------------------- the page

$("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("user-input").value.trim() === "") {
    $("user-error").textContent = "Write an id, or press New user.";
  } else if (state.meta) {
    choose($("user-input").value);
  }
});
$("new-user").addEventListener("click", () => state.meta && choose(anonymous()));
$("k").addEventListener("change", () => {
  state.shown = [];
  load(null);
});
window.addEventListener("popstate", () => {
  const asked = new URLSearchParams(location.search).get("user");
  if (asked && state.meta) choose(asked, false);
  else location.reload();
});
for (const kind of ["error", "unhandledrejection"]) {
  window.addEventListener(kind, (event) => say($("problem"), `This page has a defect: ${event.message ?? event.reason}. Load it again.`));
}
poll();
