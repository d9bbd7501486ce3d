"use strict";

const element = id => document.getElementById(id);
const END_OF_STREAM = "data: [DONE]";
const RETRY_MILLISECONDS = 1000;

let running = null;  // the AbortController of the request in flight

function showStatus(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

// Show a slider's value beside its name, now and whenever it moves.
function connectSlider(slider) {
  slider.oninput = () => {
    slider.previousElementSibling.textContent = slider.value;
  };
  slider.oninput();
}

function describeModel(health) {
  const step = health.step === null ? "" : ` at step ${health.step.toLocaleString("en")}`;
  const millions = (health.parameters / 1e6).toPrecision(3);
  const quantized = health.quantize === "none" ? "" : `, weights in ${health.quantize}`;
  return `${health.model}${step}, ${millions}M parameters, context of ${health.context} tokens, `
    + `on ${health.device} in ${health.dtype}${quantized}`;
}

// Ask the server what it has loaded, again and again until the model is there.
async function showModel() {
  const response = await fetch("health");
  const health = await response.json().catch(() => ({status: "out of reach"}));
  element("keybox").hidden = !health.key_required;
  if (!health.model) {
    element("about").textContent = `the model is ${health.status}`;
    setTimeout(showModelOrError, RETRY_MILLISECONDS);
    return;
  }
  if (!element("prompt").value) {
    element("prompt").value = health.sample_prompt ?? "";
  }
  element("about").textContent = describeModel(health);
  element("max_length").max = health.max_length_limit;
  element("max_length").oninput();  // the browser has lowered a value above the new maximum
}

function showModelOrError() {
  showModel().catch(() => {
    element("about").textContent = "the server is out of reach";
  });
}

function readSettings() {
  const body = {
    prompt: element("prompt").value,
    max_length: Number(element("max_length").value),
    temperature: Number(element("temperature").value),
    top_k: Number(element("top_k").value) || null,  // 0 is "off", for which the API has null
    top_p: Number(element("top_p").value),
    stream: true,
  };
  if (element("seed").value) {
    body.seed = Number(element("seed").value);
  }
  return body;
}

// The server's errors are JSON. A proxy in front of it answers with a page of its own.
async function errorMessage(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status} ${response.statusText}: a proxy answered, not the server`;
  }
}

async function requestStream(body, signal) {
  const headers = {"Content-Type": "application/json"};
  if (element("key").value) {
    headers["X-API-Key"] = element("key").value;
  }
  const response = await fetch("generate", {
    method: "POST", headers, body: JSON.stringify(body), signal});
  if (!response.ok) {
    throw new Error(await errorMessage(response));
  }
  return response;
}

// Yield the server-sent events of a response. A network chunk may end in the middle of an event,
// so what follows the last blank line waits for the next chunk.
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let incomplete = "";
  while (true) {
    const {done, value} = await reader.read();
    if (done) {
      return;
    }
    const events = (incomplete + value).split("\n\n");
    incomplete = events.pop();
    for (const event of events) {
      if (event !== END_OF_STREAM) {
        yield JSON.parse(event.slice("data: ".length));
      }
    }
  }
}

// Only the last event has the number of tokens; before it there is nothing to show.
function showSummary(event, seconds) {
  const tokens = event.tokens_generated;
  if (tokens !== undefined) {
    const rate = (tokens / seconds).toFixed(0);
    showStatus(`${tokens} tokens in ${seconds.toFixed(1)} s, ${rate} tokens/s; `
      + `seed ${event.seed}, ${event.finish_reason}`);
  }
}

async function streamText(signal) {
  const body = readSettings();
  const start = performance.now();
  const prompt = document.createElement("span");
  prompt.textContent = body.prompt;  // textContent: a prompt with tags in it stays text
  const generated = document.createTextNode("");
  element("text").replaceChildren(prompt, generated);
  showStatus("...");
  for await (const event of readEvents(await requestStream(body, signal))) {
    if (event.error) {
      throw new Error(event.error.message);
    }
    generated.data += event.text;
    showSummary(event, (performance.now() - start) / 1000);
  }
}

async function generate() {
  running = new AbortController();
  element("go").disabled = true;
  element("stop").disabled = false;
  try {
    await streamText(running.signal);
  } catch (error) {
    const isAbort = error.name === "AbortError";
    showStatus(isAbort ? "stopped" : error.message, !isAbort);
  }
  element("go").disabled = false;
  element("stop").disabled = true;
}

function generateOnCtrlEnter(event) {
  const isShortcut = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (isShortcut && !element("go").disabled) {
    generate();
  }
}

document.querySelectorAll("input[type=range]").forEach(connectSlider);
element("go").onclick = generate;
element("stop").onclick = () => running.abort();
element("prompt").onkeydown = generateOnCtrlEnter;
showModelOrError();
