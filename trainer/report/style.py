"""How the page looks: one column, light and dark, on a phone and on paper."""

STYLE = """
:root { --page: #fbfaf7; --card: #ffffff; --ink: #1c1f22; --soft: #585e66; --line: #e2dfd7;
  --tint: #f1efe9; --accent: #1f6383; --good: #23683f; --bad: #a8281c; --care: #8a5300;
  --c1: #2a6fbb; --c2: #c8581a; --c3: #2e8257; --c4: #7b57b8; --c5: #b03a6e; --c6: #6f7277;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #1c1f23; --ink: #e9e7e3; --soft: #a7adb5; --line: #31363c;
    --tint: #23272c; --accent: #82bfe0; --good: #7ccb98; --bad: #f28b7d; --care: #e3b15f;
    --c1: #6ba6e8; --c2: #ef8f52; --c3: #68c091; --c4: #b294e8; --c5: #e880ae; --c6: #9fa4ab; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { background: var(--page); color: var(--ink); margin: 0 auto; max-width: 1100px;
  padding: 28px 20px 64px; overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
a { color: var(--accent); } p { margin: 0.5rem 0; max-width: 75ch; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 0.4rem; letter-spacing: -0.015em; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 0.7rem; letter-spacing: -0.01em; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 0.5rem; }
section { border-top: 1px solid var(--line); margin-top: 2.4rem; padding-top: 1.6rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
p code, li code, dd p code { background: var(--tint); border-radius: 4px; padding: 0.08em 0.3em; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; line-height: 1.5;
  margin: 0.6rem 0; overflow-x: auto; padding: 0.7rem 0.9rem; }
pre code { font-size: 0.85rem; overflow-wrap: normal; } .copy code { user-select: all; }
.soft, small, .none { color: var(--soft); } .none { font-size: 0.85rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 1.1rem 0 0;
  padding: 0; font-size: 0.92rem; }

.status { font-size: 1.05rem; margin: 0.2rem 0 1.1rem; }
.status strong { border: 1.5px solid currentColor; border-radius: 99px; font-size: 0.9rem;
  margin-right: 0.5em; padding: 0.12em 0.75em; }
.status.done strong { color: var(--good); } .status.failed strong { color: var(--bad); }
.status.interrupted strong, .status.running strong { color: var(--care); }
.error { border-left: 4px solid var(--bad); padding: 0.1rem 0 0.1rem 1rem; }
.error ul { padding-left: 1.1rem; }
.facts { background: var(--card); border: 1px solid var(--line); border-radius: 12px; display: grid;
  gap: 0.9rem 1.6rem; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); margin: 1rem 0;
  padding: 1.1rem 1.3rem; }
.facts dt { color: var(--soft); font-size: 0.8rem; } .facts dd { margin: 0.1rem 0 0; }
.notes { list-style: none; margin: 1rem 0; padding: 0; } .notes li { margin: 0.5rem 0; }
.note { font-size: 0.8rem; font-weight: 600; margin-right: 0.35em; color: var(--soft); }
.note.warning { color: var(--care); }

.wide { overflow-x: auto; margin: 0.8rem 0; -webkit-overflow-scrolling: touch; }
.wide:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: 0.5rem 1.1rem 0.5rem 0; text-align: left;
  vertical-align: top; }
thead th { color: var(--soft); font-size: 0.8rem; font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; } tbody tr:last-child > * { border-bottom: 0; }
table.figures th, table.figures td { white-space: nowrap; }
table.pictures { min-width: calc(var(--first) + var(--columns) * var(--least)); table-layout: fixed;
  max-width: calc(var(--first) + var(--columns) * 230px); width: 100%; --first: 160px;
  --least: 106px; }
table.pictures thead th { vertical-align: bottom; white-space: normal; }
table.pictures th:has(> .slim) { width: 64px; }
table.pictures th:first-child { background: var(--page); left: 0;
  width: var(--first); position: sticky; z-index: 1; padding-right: 12px; }
table.pictures td { border: 0; padding: 4px 8px 8px 0; }
table.pictures tbody th { border: 0; font-size: 0.9rem; padding-top: 8px; }
table.pictures img { background: var(--tint); border-radius: 8px; width: 100%; }
table.pictures .soft { font-size: 0.8rem; font-weight: 400; }
.prompt { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 7;
  overflow: hidden; }
.prompt b { display: block; } .figure { display: block; font-size: 0.9rem; font-weight: 600; }
img { display: block; height: auto; max-width: 100%; } .pictures a, .sheet a { display: block; }
.sheet { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; max-height: 85vh;
  overflow-y: auto; }
.sheet img { width: 100%; } table.files th, table.files code { white-space: nowrap; }
table.files td:nth-child(2) { min-width: 190px; } table.files td:last-child { min-width: 260px; }
.level { font-size: 0.82rem; font-weight: 600; white-space: nowrap; }
.level.ok, .verdict.passed { color: var(--good); } .level.look { color: var(--care); }
.level.act, .verdict.failed { color: var(--bad); } .verdict.not-checked { color: var(--soft); }
.verdict { font-weight: 500; }

.charts { display: grid; gap: 26px 34px; grid-template-columns: repeat(auto-fit, minmax(min(100%,
  380px), 1fr)); }
.chart { margin: 0; min-width: 0; } .chart.whole { grid-column: 1 / -1; }
figcaption { font-weight: 600; }
.legend { color: var(--soft); display: flex; flex-wrap: wrap; font-size: 0.85rem; gap: 2px 16px;
  list-style: none; margin: 0.2rem 0 0; padding: 0; }
.key { background: currentColor; border-radius: 2px; display: inline-block; height: 3px;
  margin-right: 6px; vertical-align: middle; width: 20px; }
.key.notch { background: var(--soft); height: 9px; width: 2px; }
.phases { color: var(--soft); font-size: 0.85rem; list-style: none; margin: 0.2rem 0; padding: 0; }
.plot { padding: 14px 10px 48px 56px; } .plot > svg { display: block; height: 190px; width: 100%;
  overflow: visible; }
.whole .plot > svg { height: 250px; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
line.grid { stroke: var(--line); } line.notch { stroke: var(--soft); stroke-width: 2; }
line.phase { stroke: var(--soft); stroke-dasharray: 4 4; } text.phase { font-weight: 700; }
.line polyline { fill: none; stroke: currentColor; stroke-linejoin: round; stroke-width: 2;
  vector-effect: non-scaling-stroke; }
svg.line { overflow: visible; } .line.faint polyline { stroke-width: 1; } .faint { opacity: 0.38; }
.dot { fill: currentColor; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); }

details { margin: 0.5rem 0; } summary { color: var(--accent); cursor: pointer; padding: 0.2rem 0; }
.chart summary { font-size: 0.85rem; }
.options { margin: 0.4rem 0 1rem; } .options > div { border-bottom: 1px solid var(--line);
  display: grid; gap: 0.1rem 1.4rem; grid-template-columns: minmax(210px, 27%) 1fr;
  padding: 0.55rem 0; }
.options > div:last-child { border: 0; } .options dd { margin: 0; min-width: 0; }
.options p, .how, .reason { color: var(--soft); font-size: 0.88rem; }
.options p { margin: 0.1rem 0; }
.value { font-weight: 600; overflow-wrap: anywhere; } .how { margin-left: 0.7em; }
.reason { display: block; } .reasons { font-size: 0.9rem; padding-left: 1.1rem; }
footer { border-top: 1px solid var(--line); color: var(--soft); font-size: 0.85rem;
  margin-top: 3rem; padding-top: 1rem; }

@media (max-width: 620px) {
  body { padding: 20px 16px 48px; } h1 { font-size: 1.6rem; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); padding: 0.9rem 1rem; }
  .options > div { grid-template-columns: 1fr; }
  table.pictures { --first: 112px; --least: 136px; }
  table.pictures th:first-child { font-size: 0.8rem; } .plot { padding-left: 44px; }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --tint: #f4f4f4;
    --accent: #000; }
  body { font-size: 11pt; max-width: none; padding: 0; } nav { display: none; }
  .wide, .sheet { max-height: none; overflow: visible; }
  table.pictures th:first-child { position: static; } .chart details { display: none; }
  table.files :is(th, td, code) { min-width: 0; overflow-wrap: anywhere; white-space: normal; }
  table.pictures { min-width: 0; } tr, figure, .options > div { break-inside: avoid; }
  h2, h3 { break-after: avoid; } pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
