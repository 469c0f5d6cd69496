"use strict";
const $ = (id) => document.getElementById(id);
const sides = { with: [], without: [] }; // the messages of each chat
let info = { prompts: [], chat: true };
let running = null; // the AbortController of what is being answered

const headers = () => {
  const given = { "content-type": "application/json" };
  if ($("key").value) given.authorization = `Bearer ${$("key").value}`;
  return given;
};
const nameOf = (prompt) => (prompt < 0 ? "none" : info.prompts[prompt] ?? String(prompt));

function turn(side, role, text) {
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  element.textContent = text;
  $(side).append(element);
  $(side).scrollTop = $(side).scrollHeight;
  return element;
}

function body(side, more) {
  const forced = side === "without" ? -1 : $("forced").value === "" ? null : Number($("forced").value);
  const given = { model: info.model, max_tokens: Number($("tokens").value) || 128, temperature: 0, ...more };
  if (forced !== null) given.idp_prompt = forced;
  if (info.chat) given.messages = sides[side];
  else given.prompt = sides[side].map((message) => message.content).join("");
  return given;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const lines = rest.split(/\r\n|\n|\r/);
    rest = done ? "" : lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) {
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
    if (done) return;
  }
}

async function answer(side, signal) {
  const element = turn(side, "assistant waiting", "");
  try {
    const path = info.chat ? "v1/chat/completions" : "v1/completions";
    const request = { method: "POST", headers: headers(), body: JSON.stringify(body(side, { stream: true })), signal };
    const response = await fetch(path, request);
    if (!response.ok) throw new Error(await failure(response));
    if (side === "with") showChosen(Number(response.headers.get("x-idp-prompt")));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      element.textContent += (info.chat ? choice?.delta?.content : choice?.text) ?? "";
      $(side).scrollTop = $(side).scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      turn(side, "error", `No answer: ${error.message}`);
    }
    if (!element.textContent) element.remove();
  }
  element.classList.remove("waiting");
  if (element.isConnected) sides[side].push({ role: "assistant", content: element.textContent });
}

function showChosen(prompt) {
  const how = $("forced").value === "" ? "chosen by the text" : "forced";
  $("choice").textContent = `Prompt: ${nameOf(prompt)} (${how}).`;
  for (const element of $("scores").children) element.classList.toggle("chosen", Number(element.dataset.prompt) === prompt);
}

async function showScores(signal) {
  $("scores").replaceChildren();
  const request = { method: "POST", headers: headers(), body: JSON.stringify(body("with")), signal };
  const response = await fetch("playground/choice", request).catch(() => null);
  if (!response?.ok) return;
  const { scores, prompt } = await response.json();
  if (!scores) return;
  const low = Math.min(...scores);
  const high = Math.max(...scores);
  scores.forEach((score, index) => {
    const element = document.createElement("span");
    element.className = index === prompt ? "score chosen" : "score";
    element.dataset.prompt = index;
    const meter = document.createElement("meter");
    meter.value = high > low ? (score - low) / (high - low) : 1;
    element.append(nameOf(index), meter, score.toPrecision(3));
    $("scores").append(element);
  });
}

async function send() {
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  running = new AbortController();
  $("send").disabled = $("new").disabled = true;
  $("stop").disabled = false;
  for (const side of ["with", "without"]) {
    turn(side, "user", text);
    sides[side].push({ role: "user", content: text });
  }
  await showScores(running.signal);
  await Promise.all([answer("with", running.signal), answer("without", running.signal)]);
  for (const side of ["with", "without"]) {
    if (sides[side].at(-1).role === "user") sides[side].pop(); // it had no answer
  }
  running = null;
  $("send").disabled = $("new").disabled = false;
  $("stop").disabled = true;
  $("text").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  for (const side of ["with", "without"]) {
    sides[side] = [];
    $(side).replaceChildren();
  }
  $("scores").replaceChildren();
  $("choice").textContent = "Write something: the prompt that it chooses is shown here.";
});
fetch("playground/info").then(async (response) => {
  info = await response.json();
  $("model").textContent = info.model;
  $("key-label").hidden = !info.needs_key;
  info.prompts.forEach((name, index) => $("forced").append(new Option(name, index)));
  if (!info.chat) $("text").placeholder = "The model has no chat template: it goes on with this text.";
});
