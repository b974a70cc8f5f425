//! The files of the live page, embedded in the program. The page loads and runs nothing else.

use axum::extract::Path;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Permits the `style` property of elements, which uPlot and the page use, but no inline styles or scripts in the HTML.
const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const INDEX: &str = include_str!("page/index.html");

/// Name, type and content of each file.
const FILES: &[(&str, &str, &str)] = &[
    ("style.css", CSS, include_str!("page/style.css")),
    ("icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
    ("main.js", SCRIPT, include_str!("page/main.js")),
    ("connection.js", SCRIPT, include_str!("page/connection.js")),
    ("model.js", SCRIPT, include_str!("page/model.js")),
    ("format.js", SCRIPT, include_str!("page/format.js")),
    ("header.js", SCRIPT, include_str!("page/header.js")),
    ("timeline.js", SCRIPT, include_str!("page/timeline.js")),
    ("graph.js", SCRIPT, include_str!("page/graph.js")),
    ("breakdown.js", SCRIPT, include_str!("page/breakdown.js")),
    ("charts.js", SCRIPT, include_str!("page/charts.js")),
    ("processes.js", SCRIPT, include_str!("page/processes.js")),
    ("incidents.js", SCRIPT, include_str!("page/incidents.js")),
    // uPlot 1.6.32, as published, with its licence.
    ("uplot.js", SCRIPT, include_str!("page/uplot.js")),
    ("uplot.css", CSS, include_str!("page/uplot.css")),
    ("uplot.LICENSE", "text/plain; charset=utf-8", include_str!("page/uplot.LICENSE")),
];

fn headers(kind: &'static str) -> [(HeaderName, &'static str); 5] {
    [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A rebuilt program may serve other files under the same names.
        (header::CACHE_CONTROL, "no-cache"),
    ]
}

pub(super) async fn index() -> impl IntoResponse {
    (headers(HTML), INDEX)
}

pub(super) async fn file(Path(name): Path<String>) -> Response {
    match FILES.iter().find(|file| file.0 == name) {
        Some((_, kind, text)) => (headers(kind), *text).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
