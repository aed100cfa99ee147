//! Cursor pagination, as all of OpenAI's lists do it.

use serde::Deserialize;
use serde_json::{Value, json};
use shoal_proto::Error;
use utoipa::IntoParams;

/// The query of a list.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// Items after this one.
    pub after: Option<String>,
    /// Items before this one.
    pub before: Option<String>,
    /// How many.
    pub limit: Option<u64>,
    /// `asc` or `desc`, by the time of creation.
    pub order: Option<String>,
    /// Files of this purpose.
    pub purpose: Option<String>,
    /// Store files of this state.
    pub filter: Option<String>,
}

/// Cuts one page out of items with (time of creation, id, shape).
///
/// # Errors
/// Invalid argument that names the parameter.
pub fn page(
    mut items: Vec<(u64, String, Value)>,
    query: &PageQuery,
    most: u64,
    default: u64,
) -> Result<Value, Error> {
    let limit = query.limit.unwrap_or(default);
    if !(1..=most).contains(&limit) {
        return Err(Error::invalid("limit", format!("{limit} is not between 1 and {most}")));
    }
    items.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    match query.order.as_deref() {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => return Err(Error::invalid("order", "expected asc or desc")),
    }
    let place = |id: &String, field: &str| {
        items
            .iter()
            .position(|(_, known, _)| known == id)
            .ok_or_else(|| Error::invalid(field, format!("{id} is not in the list")))
    };
    let start = query.after.as_ref().map(|id| place(id, "after")).transpose()?.map_or(0, |at| at + 1);
    let end = query.before.as_ref().map(|id| place(id, "before")).transpose()?.unwrap_or(items.len());
    let rest = items.get(start.min(end)..end).unwrap_or_default();
    let data: Vec<&Value> = rest.iter().take(limit as usize).map(|(_, _, shape)| shape).collect();
    let id = |item: Option<&&Value>| item.and_then(|item| item.get("id")).cloned();
    Ok(json!({
        "object": "list",
        "data": data,
        "first_id": id(data.first()),
        "last_id": id(data.last()),
        "has_more": rest.len() > data.len(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_without_gap() {
        let items = || {
            (0..7u64).map(|n| (n / 2, format!("id{n}"), json!({"id": format!("id{n}")}))).collect::<Vec<_>>()
        };
        let mut query = PageQuery { limit: Some(3), order: Some("asc".into()), ..PageQuery::default() };
        let mut seen = Vec::new();
        loop {
            let page = page(items(), &query, 100, 20).expect("a page");
            seen.extend(
                page["data"]
                    .as_array()
                    .expect("data")
                    .iter()
                    .map(|item| item["id"].as_str().expect("id").to_owned()),
            );
            query.after = page["last_id"].as_str().map(str::to_owned);
            if page["has_more"] == json!(false) {
                break;
            }
        }
        assert_eq!(seen, (0..7).map(|n| format!("id{n}")).collect::<Vec<_>>());
        assert!(page(items(), &PageQuery { limit: Some(0), ..PageQuery::default() }, 100, 20).is_err());
        assert!(
            page(items(), &PageQuery { after: Some("no".into()), ..PageQuery::default() }, 100, 20).is_err()
        );
    }
}
