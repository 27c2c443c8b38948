"""How the report looks and moves: its style sheet and its script, both in the page, so that it needs no network."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #16202b; --quiet: #5b6775; --ground: #f6f7f9; --card: #ffffff; --line: #dde2e8; --accent: #0b7a75; --rest: #9aa7b4;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8edf2; --quiet: #9daab8; --ground: #11161c; --card: #1a2129; --line: #2c3641; --accent: #35c6bd; --rest: #5d6b79; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.6rem); line-height: 1.1; margin: .2rem 0 .6rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .3rem; letter-spacing: -.01em; } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { max-width: 68ch; margin: .3rem 0 .9rem; } .lead { font-size: 1.12rem; } .quiet, figcaption { color: var(--quiet); }
.eyebrow { color: var(--accent); font-weight: 600; font-size: .85rem; letter-spacing: .04em; text-transform: uppercase; margin: 0; }
.made { font: .8rem/1.5 ui-monospace, monospace; color: var(--quiet); overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.1rem; min-width: 0; }
.hero { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); gap: 1.1rem; margin-top: 1.2rem; align-items: start; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.1rem; align-items: start; }
.numbers { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .8rem; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.15; font-variant-numeric: tabular-nums; letter-spacing: -.02em; }
.tile span { font-size: .86rem; color: var(--quiet); } .tile.chosen { border-color: var(--accent); } .tile.chosen b { color: var(--accent); }
figure { margin: 0; } figcaption { font-size: .9rem; margin-bottom: .5rem; }
svg { width: 100%; height: auto; display: block; }
.viewer { position: relative; aspect-ratio: var(--shape); border-radius: 8px; overflow: hidden; touch-action: pan-y; cursor: ew-resize; --cut: 50%; }
.viewer div { position: absolute; inset: 0; background-repeat: no-repeat; image-rendering: pixelated; }
.viewer .over { clip-path: inset(0 0 0 var(--cut)); }
.viewer .edge { left: var(--cut); width: 2px; right: auto; background: #fff; box-shadow: 0 0 0 1px #0006; }
.viewer small { position: absolute; bottom: .5rem; padding: .1rem .5rem; border-radius: 99px; background: #000a; color: #fff; font-size: .78rem; }
.viewer small.left { left: .5rem; } .viewer small.right { right: .5rem; }
input[type=range] { width: 100%; accent-color: var(--accent); margin: .6rem 0 0; }
.choices { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .5rem; }
button { font: inherit; font-size: .86rem; color: inherit; background: none; border: 1px solid var(--line); border-radius: 99px; padding: .2rem .75rem; cursor: pointer; }
button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); font-weight: 600; }
button.thumb { padding: 0; border-radius: 6px; width: 42px; aspect-ratio: var(--shape); background-repeat: no-repeat; image-rendering: pixelated; border-width: 2px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.rows { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .5rem .9rem; align-items: center; }
.rows img, .frames { width: 100%; max-width: calc(var(--count) * 96px); display: block; image-rendering: pixelated; border-radius: 4px; }
.rows span { font-size: .9rem; } .rows span b { display: block; }
.frames { overflow: hidden; position: relative; aspect-ratio: var(--ratio); } .frames img { position: absolute; width: 100%; max-width: none; border-radius: 0; }
.map { position: relative; } .map img { width: 100%; height: clamp(220px, 34vw, 340px); display: block; image-rendering: pixelated; border-radius: 6px; }
.map i { position: absolute; left: 0; right: 0; height: 0; border-top: 1px solid #fff; box-shadow: 0 0 0 1px #0008; display: none; pointer-events: none; }
.ends { display: flex; justify-content: space-between; font-size: .8rem; color: var(--quiet); }
.read { font: .82rem/1.4 ui-monospace, monospace; min-height: 2.8em; overflow-wrap: anywhere; }
.layers { display: flex; height: 30px; border-radius: 6px; overflow: hidden; gap: 1px; } .layers i { flex: 1; }
.modiff { background: var(--accent); } .int8 { background: var(--rest); } .float { background: var(--line); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .86rem; margin-top: .5rem; } .key i { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .4em; }
.bars { display: grid; grid-template-columns: max-content minmax(60px, 1fr) max-content; gap: .3rem .7rem; align-items: center; font-size: .88rem; font-variant-numeric: tabular-nums; }
.bars i { height: .85em; border-radius: 3px; background: var(--rest); min-width: 2px; } .bars .best { background: var(--accent); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } thead th { color: var(--quiet); font-weight: 600; }
details { margin: .7rem 0; } summary { cursor: pointer; color: var(--accent); font-size: .92rem; }
pre { overflow-x: auto; font-size: .78rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; }
@media (max-width: 760px) { .hero { grid-template-columns: minmax(0, 1fr); } .rows { grid-template-columns: minmax(0, 1fr); gap: .2rem; } .rows span b { display: inline; margin-right: .5em; } }
"""

SCRIPT = """
const all = (what, where = document) => [...where.querySelectorAll(what)];
for (const viewer of all('.viewer')) {
  const box = viewer.parentElement, cut = box.querySelector('input[type=range]');
  const layers = all('div.of', viewer), thumbs = all('button.thumb', box), names = all('button.method', box);
  const count = thumbs.length, over = viewer.querySelector('.over'), label = viewer.querySelector('small.right');
  const at = k => `${count > 1 ? 100 * k / (count - 1) : 0}% 0`;
  const slide = value => { cut.value = value; viewer.style.setProperty('--cut', value + '%'); };
  const press = (buttons, one) => buttons.forEach(b => b.setAttribute('aria-pressed', b === one));
  thumbs.forEach((b, k) => b.addEventListener('click', () => { press(thumbs, b); layers.forEach(l => l.style.backgroundPosition = at(k)); }));
  names.forEach(b => b.addEventListener('click', () => { press(names, b); over.style.backgroundImage = `var(--${b.dataset.images})`; label.textContent = b.textContent; }));
  cut.addEventListener('input', () => slide(cut.value));
  const drag = e => { const r = viewer.getBoundingClientRect(); slide(Math.min(100, Math.max(0, 100 * (e.clientX - r.left) / r.width))); };
  viewer.addEventListener('pointerdown', e => { viewer.setPointerCapture(e.pointerId); drag(e); });
  viewer.addEventListener('pointermove', e => { if (e.buttons) drag(e); });
}
const slider = document.getElementById('step');
if (slider) {
  const steps = JSON.parse(slider.dataset.steps);
  const show = () => {
    all('.frames img').forEach(img => img.style.transform = `translateY(${-100 * slider.value / steps.length}%)`);
    document.getElementById('where').textContent = steps[slider.value];
  };
  slider.addEventListener('input', show); show();
}
for (const map of all('.map')) {
  const { names, steps, values } = JSON.parse(map.dataset.map), line = map.querySelector('i'), read = map.parentElement.querySelector('.read');
  map.addEventListener('pointermove', e => {
    const r = map.getBoundingClientRect(), l = Math.min(names.length - 1, Math.floor(names.length * (e.clientY - r.top) / r.height));
    const s = Math.min(steps.length - 1, Math.floor(steps.length * (e.clientX - r.left) / r.width));
    if (l < 0 || s < 0) return;
    line.style.display = 'block'; line.style.top = 100 * (l + .5) / names.length + '%';
    read.textContent = `${names[l]}, t = ${steps[s]}: ${values[l][s] === null ? 'none' : values[l][s]}`;
  });
  map.addEventListener('pointerleave', () => line.style.display = 'none');
}
for (const strip of all('.layers')) {
  const read = strip.parentElement.querySelector('.read');
  strip.addEventListener('pointermove', e => { if (e.target.title) read.textContent = e.target.title; });
}
"""
