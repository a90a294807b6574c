//! Pictures of a run, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Colours that stay apart for colour-blind readers (Okabe and Ito's palette).
pub const COLOURS: [RGBColor; 7] = [
    RGBColor(153, 153, 153),
    RGBColor(90, 90, 90),
    RGBColor(86, 180, 233),
    RGBColor(0, 114, 178),
    RGBColor(240, 190, 80),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
];

const FONT: &str = "sans-serif";
/// Bars in a panel beyond which their labels stand upright.
const MANY_BARS: usize = 6;

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Text over it.
    pub label: String,
    /// Its height.
    pub value: f64,
    /// Smallest and largest measurement.
    pub range: (f64, f64),
    /// Which of [`COLOURS`].
    pub series: usize,
}

/// Bars that share an axis.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Over the bars.
    pub title: String,
    /// The bars, from left to right.
    pub bars: Vec<Bar>,
}

/// Draws panels side by side, each with an axis of its own, under one legend.
///
/// # Errors
/// When the file cannot be written.
pub fn bars(path: &Path, title: &str, legend: &[(&str, usize)], panels: &[Panel]) -> Result<()> {
    let width = 120 + 260 * panels.len().max(3) as u32;
    let root = SVGBackend::new(path, (width, 420)).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    let (head, body) = root.split_vertically(64);
    heading(&head, title, legend)?;
    for (area, panel) in body.split_evenly((1, panels.len().max(1))).iter().zip(panels) {
        draw_bars(area, panel)?;
    }
    root.present().map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

fn text(size: i32) -> TextStyle<'static> {
    (FONT, size).into_font().color(&RGBColor(40, 40, 40))
}

fn heading(area: &Area<'_>, title: &str, legend: &[(&str, usize)]) -> Result<()> {
    area.draw_text(title, &text(18), (16, 10)).map_err(failed)?;
    let mut x = 16;
    for (name, series) in legend {
        let colour = COLOURS[series % COLOURS.len()];
        area.draw(&Rectangle::new([(x, 40), (x + 12, 52)], colour.filled())).map_err(failed)?;
        area.draw_text(name, &text(13), (x + 18, 39)).map_err(failed)?;
        x += 40 + 8 * name.chars().count() as i32;
    }
    Ok(())
}

fn draw_bars(area: &Area<'_>, panel: &Panel) -> Result<()> {
    let is_crowded = panel.bars.len() > MANY_BARS;
    let room = if is_crowded { 1.6 } else { 1.12 };
    let top = panel.bars.iter().map(|bar| bar.value.max(bar.range.1)).fold(0.0, f64::max).max(1e-9) * room;
    let digits = usize::from(top < 5.0);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, text(15))
        .margin(8)
        .set_label_area_size(LabelAreaPosition::Left, 52)
        .set_label_area_size(LabelAreaPosition::Bottom, 10)
        .build_cartesian_2d(0.0..panel.bars.len().max(1) as f64, 0.0..top)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_labels(6)
        .y_label_formatter(&|value| format!("{value:.digits$}"))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_style(RGBColor(160, 160, 160))
        .label_style(text(12))
        .draw()
        .map_err(failed)?;
    for (i, bar) in panel.bars.iter().enumerate() {
        let (x, colour) = (i as f64, COLOURS[bar.series % COLOURS.len()]);
        let middle = x + 0.5;
        let body = Rectangle::new([(x + 0.12, 0.0), (x + 0.88, bar.value)], colour.filled());
        chart.draw_series([body]).map_err(failed)?;
        let whisker = PathElement::new([(middle, bar.range.0), (middle, bar.range.1)], BLACK.stroke_width(1));
        chart.draw_series([whisker]).map_err(failed)?;
        let style = if is_crowded {
            text(11).transform(FontTransform::Rotate270).pos(Pos::new(HPos::Left, VPos::Center))
        } else {
            text(12).pos(Pos::new(HPos::Center, VPos::Bottom))
        };
        let place = (middle, bar.value.max(bar.range.1) + top * 0.01);
        chart.draw_series([Text::new(bar.label.clone(), place, style)]).map_err(failed)?;
    }
    Ok(())
}

/// A line or a cloud of points.
#[derive(Clone, Debug)]
pub struct Series {
    /// Points, or the corners of the line.
    pub points: Vec<(f64, f64)>,
    /// Which of [`COLOURS`].
    pub colour: usize,
    /// Whether to join them.
    pub joined: bool,
}

/// Series over two axes.
#[derive(Clone, Debug)]
pub struct Graph {
    /// Over it.
    pub title: String,
    /// Under the horizontal axis.
    pub x: String,
    /// Whether the horizontal axis is logarithmic.
    pub log_x: bool,
    /// Whether the vertical axis is logarithmic.
    pub log_y: bool,
    /// What is drawn.
    pub series: Vec<Series>,
}

/// Draws graphs, and bars if there are any, side by side under one legend.
///
/// # Errors
/// When the file cannot be written.
pub fn graphs(
    path: &Path,
    title: &str,
    legend: &[(&str, usize)],
    graphs: &[Graph],
    panel: Option<&Panel>,
) -> Result<()> {
    let count = graphs.len() as u32 + u32::from(panel.is_some());
    let root = SVGBackend::new(path, (420 * count, 420)).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    let (head, body) = root.split_vertically(64);
    heading(&head, title, legend)?;
    let areas = body.split_evenly((1, count as usize));
    for (area, graph) in areas.iter().zip(graphs) {
        draw_graph(area, graph)?;
    }
    if let Some((area, panel)) = areas.last().zip(panel) {
        draw_bars(area, panel)?;
    }
    root.present().map_err(failed)
}

/// Logarithmic axes are drawn on the logarithm and labelled with the value: three kinds of coordinates in one function.
fn draw_graph(area: &Area<'_>, graph: &Graph) -> Result<()> {
    let scale = |value: f64, log: bool| if log { value.max(1e-3).log10() } else { value };
    let place = |&(x, y): &(f64, f64)| (scale(x, graph.log_x), scale(y, graph.log_y));
    let points = || graph.series.iter().flat_map(|series| &series.points).map(place);
    let range = |pick: fn((f64, f64)) -> f64, log: bool| {
        let (low, high) = points().map(pick).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        match (low < high, log) {
            (true, true) => low..high,
            (true, false) => low.min(0.0)..high * 1.02,
            (false, _) if low == high => low - 1.0..low + 1.0,
            (false, _) => 0.0..1.0,
        }
    };
    let mut chart = ChartBuilder::on(area)
        .caption(&graph.title, text(15))
        .margin(8)
        .set_label_area_size(LabelAreaPosition::Left, 52)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d(range(|point| point.0, graph.log_x), range(|point| point.1, graph.log_y))
        .map_err(failed)?;
    let show = |value: &f64, log: bool| {
        let value = if log { 10_f64.powf(*value) } else { *value };
        if value.abs() >= 10.0 || value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") }
    };
    chart
        .configure_mesh()
        .x_desc(&graph.x)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|value| show(value, graph.log_x))
        .y_label_formatter(&|value| show(value, graph.log_y))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_style(RGBColor(160, 160, 160))
        .label_style(text(12))
        .draw()
        .map_err(failed)?;
    for series in &graph.series {
        let colour = COLOURS[series.colour % COLOURS.len()];
        let points = series.points.iter().map(place);
        if series.joined {
            chart
                .draw_series([PathElement::new(points.collect::<Vec<_>>(), colour.stroke_width(2))])
                .map_err(failed)?;
        } else {
            let dots = points.map(|point| Circle::new(point, 1.5, colour.mix(0.5).filled()));
            chart.draw_series(dots).map_err(failed)?;
        }
    }
    Ok(())
}

/// Named lines over one axis of seconds.
#[derive(Clone, Debug)]
pub struct Lines {
    /// Over it.
    pub title: String,
    /// Text behind each value of the vertical axis, such as `%`; with the factor that turns a value into that unit.
    pub unit: (String, f64),
    /// The lines, each with its name: seconds and values.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

/// Draws lines in rows of three, each with its names below.
///
/// # Errors
/// When the file cannot be written.
pub fn lines(path: &Path, title: &str, panels: &[Lines]) -> Result<()> {
    let rows = panels.len().div_ceil(3).max(1);
    let root = SVGBackend::new(path, (1_260, 44 + 300 * rows as u32)).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    let (head, body) = root.split_vertically(44);
    heading(&head, title, &[])?;
    for (area, panel) in body.split_evenly((rows, 3)).iter().zip(panels) {
        draw_lines(area, panel)?;
    }
    root.present().map_err(failed)
}

fn draw_lines(area: &Area<'_>, panel: &Lines) -> Result<()> {
    let Lines { title, unit: (unit, factor), lines } = panel;
    let points = || lines.iter().flat_map(|(_, points)| points);
    let start = points().map(|point| point.0).fold(f64::MAX, f64::min).min(0.0);
    let end = points().map(|point| point.0).fold(1.0, f64::max);
    let top = points().map(|point| point.1 * factor).fold(0.0, f64::max).max(1e-6) * 1.1;
    // Three names stand in a line below the axes.
    let (body, foot) = area.split_vertically(300 - 14 - 16 * lines.len().div_ceil(2).min(3) as i32);
    let mut chart = ChartBuilder::on(&body)
        .caption(title, text(14))
        .margin(8)
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 24)
        .build_cartesian_2d(start..end, 0.0..top)
        .map_err(failed)?;
    let digits = if top < 0.5 {
        3
    } else if top < 20.0 {
        1
    } else {
        0
    };
    chart
        .configure_mesh()
        .x_labels(6)
        .y_labels(5)
        .x_label_formatter(&|value| format!("{value:.0} s"))
        .y_label_formatter(&|value| format!("{value:.digits$}{unit}"))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_style(RGBColor(160, 160, 160))
        .label_style(text(11))
        .draw()
        .map_err(failed)?;
    for (index, (name, points)) in lines.iter().enumerate() {
        let colour = LINE_COLOURS[index % LINE_COLOURS.len()];
        let corners: Vec<_> = points.iter().map(|(x, y)| (*x, y * factor)).collect();
        chart.draw_series([PathElement::new(corners, colour.stroke_width(2))]).map_err(failed)?;
        let (x, y) = (20 + 200 * (index as i32 % 2), 2 + 16 * (index as i32 / 2));
        if index < 6 {
            foot.draw(&Rectangle::new([(x, y + 2), (x + 10, y + 10)], colour.filled())).map_err(failed)?;
            let short: String = name.chars().take(30).collect();
            foot.draw_text(&short, &text(11), (x + 15, y)).map_err(failed)?;
        }
    }
    Ok(())
}

/// [`COLOURS`] with the strong ones first.
const LINE_COLOURS: [RGBColor; 7] =
    [COLOURS[3], COLOURS[5], COLOURS[6], COLOURS[4], COLOURS[2], COLOURS[1], COLOURS[0]];
