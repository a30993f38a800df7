"""The page's style sheet: light and dark, with Okabe and Ito's colours for the colour-blind."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #fff; --front: #1b1f24; --soft: #57606a; --line: #d0d7de; --stripe: #f6f8fa;
  --proved: #0072b2; --open: #c9d3de; --attack: #d55e00; --good: #00664a; --bad: #a63a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14181d; --front: #e6edf3; --soft: #9aa5b1; --line: #39424d; --stripe: #1c222a;
    --proved: #56b4e9; --open: #46525f; --attack: #e69f00; --good: #4ed6ac; --bad: #ffa561;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--front);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3, p { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-top: 1.75rem; }
.scroll, .plot { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
th, td { padding: 0.25rem 0.75rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
thead th { font-weight: 600; }
tbody tr:nth-child(even) { background: var(--stripe); }
.inputs th, .inputs td { max-width: 24rem; overflow-wrap: break-word; }
.inputs .long { min-width: 12rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.alert { border: 3px solid var(--bad); padding: 0.75rem 1rem; margin: 1rem 0;
  overflow-wrap: anywhere; }
svg { display: block; width: 100%; min-width: 36rem; max-width: 50rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.proved { fill: var(--proved); background: var(--proved); }
.open { fill: var(--open); background: var(--open); }
.attack { stroke: var(--attack); }
.attack-mark { background: var(--attack); }
.dashed { stroke-dasharray: 7 4; }
.proved-line { stroke: var(--proved); }
.row:hover { opacity: 0.75; }
.swatch { display: inline-block; width: 1em; height: 0.7em; }
.sentence, .legend { line-height: 2.2; }
.name { color: var(--soft); margin-right: 0.5rem; }
.word { padding: 0.15rem 0.4rem; margin: 0 0.15rem; border: 1px solid var(--line);
  border-radius: 0.25rem; display: inline-block; line-height: 1.4; max-width: 100%; }
.word small { font-size: 0.7rem; font-variant-numeric: tabular-nums; }
.none { border: 2px dashed var(--bad); }
"""
