//! Questions and answers as one line of JSON each, one connection per question: between the controller and a launcher, and between
//! the controllers of two clusters. KubeVirt has gRPC there; nothing of ours ever sees either.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

/// A VMI with all its status is some ten KiB.
const LINE_BYTES_MAX: u64 = 4 << 20;

/// The other side is away, slow, or does not speak as we do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("unreadable: {0}")]
    Json(#[from] serde_json::Error),
    #[error("no answer within {} s", .0.as_secs_f32())]
    Late(Duration),
}

/// Asks over a connection that nothing else uses.
pub async fn ask<A: DeserializeOwned>(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    question: &impl Serialize,
    patience: Duration,
) -> Result<A, Error> {
    let mut stream = BufReader::new(stream);
    let exchange = async {
        write(&mut stream, question).await?;
        read(&mut stream).await
    };
    tokio::time::timeout(patience, exchange).await.map_err(|_| Error::Late(patience))?
}

/// Answers the one question of a connection.
pub async fn answer<Q: DeserializeOwned, A: Serialize>(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    reply: impl AsyncFnOnce(Q) -> A,
) -> Result<(), Error> {
    let mut stream = BufReader::new(stream);
    let question = read(&mut stream).await?;
    let answer = reply(question).await;
    write(&mut stream, &answer).await?;
    Ok(stream.shutdown().await?)
}

async fn write(stream: &mut (impl AsyncWrite + Unpin), value: &impl Serialize) -> Result<(), Error> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    Ok(stream.flush().await?)
}

async fn read<T: DeserializeOwned>(stream: &mut (impl AsyncBufReadExt + Unpin)) -> Result<T, Error> {
    let mut line = Vec::new();
    stream.take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_question_is_answered_once_and_silence_ends_in_an_error() {
        let (near, far) = tokio::io::duplex(64);
        let answering = tokio::spawn(answer(far, async |number: u32| number + 1));
        let answer: u32 = ask(near, &41, Duration::from_secs(5)).await.unwrap();
        assert_eq!(answer, 42);
        answering.await.unwrap().unwrap();
        let (near, _far) = tokio::io::duplex(64);
        let late = ask::<u32>(near, &1, Duration::from_millis(10)).await;
        assert!(matches!(late, Err(Error::Late(_))), "{late:?}");
    }
}
