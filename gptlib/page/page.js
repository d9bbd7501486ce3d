"use strict";
const $ = id => document.getElementById(id), tell = (text, bad) => {
  $("status").textContent = text; $("status").classList.toggle("bad", !!bad) };
for (const knob of document.querySelectorAll("input[type=range]"))
  (knob.oninput = () => knob.previousElementSibling.textContent = knob.value)();

async function look() {  // what is loaded, and what it needs
  const health = await (await fetch("health")).json().catch(() => ({status: "out of reach"}));
  $("keybox").hidden = !health.key_required;
  if (!health.model) { $("about").textContent = "the model is " + health.status; return setTimeout(look, 1000); }
  if (!$("prompt").value) $("prompt").value = health.sample_prompt;
  const at = health.step === null ? "" : ` at step ${health.step.toLocaleString("en")}`;
  $("about").textContent = `${health.model}${at}, ${(health.parameters / 1e6).toPrecision(3)}M parameters, context of `
    + `${health.context} tokens, on ${health.device} in ${health.dtype}`;
  $("max_length").max = health.max_length_limit; $("max_length").oninput();
}
look().catch(() => { $("about").textContent = "the server is out of reach" });

let running = null;
async function generate() {
  running = new AbortController();
  $("go").disabled = true; $("stop").disabled = false;
  const body = {prompt: $("prompt").value, max_length: +$("max_length").value, temperature: +$("temperature").value,
    top_k: +$("top_k").value || null, top_p: +$("top_p").value, stream: true};
  if ($("seed").value) body.seed = +$("seed").value;
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers["X-API-Key"] = $("key").value;
  const said = document.createElement("span"), start = performance.now();
  said.textContent = body.prompt; $("text").replaceChildren(said, ""); tell("...");
  try {
    const response = await fetch("generate", {method: "POST", headers, body: JSON.stringify(body), signal: running.signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let held = "", part; !(part = await reader.read()).done;) {
      const events = (held + part.value).split("\n\n");
      held = events.pop();
      for (const event of events.filter(e => e !== "data: [DONE]").map(e => JSON.parse(e.slice(6)))) {
        if (event.error) throw new Error(event.error.message);
        $("text").lastChild.data += event.text;
        const n = event.tokens_generated, seconds = (performance.now() - start) / 1000;
        if (n !== undefined) tell(`${n} tokens in ${seconds.toFixed(1)} s, ${(n / seconds).toFixed(0)} tokens/s; seed `
          + `${event.seed}, ${event.finish_reason}`);
      }
    }
  } catch (error) { error.name === "AbortError" ? tell("stopped") : tell(error.message, true); }
  $("go").disabled = false; $("stop").disabled = true;
}
$("go").onclick = generate;
$("stop").onclick = () => running.abort();
$("prompt").onkeydown = e => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey) && !$("go").disabled) generate() };
