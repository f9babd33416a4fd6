//! The h2 library as the peer, in both roles.

use tokio_rustls::TlsAcceptor;

use super::*;

#[tokio::test]
async fn a_client_of_the_library_is_served() {
    let (client, (socket, tls)) = stranger().await;
    let (mut requests, _control, connection) = Connection::server(socket, tls, SETTINGS);
    start(connection);
    let serving = start(async move {
        while let Some(request) = requests.next().await {
            assert_eq!(request.authority.as_deref(), Some("10.0.0.1:80"));
            assert_eq!(request.headers.get("forwarded").unwrap(), "for=10.1.2.3");
            let mut stream = request.accept().unwrap();
            start(async move {
                let (mut read, mut write) = tokio::io::split(&mut stream);
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    let (send, connection) = h2::client::handshake(client).await.unwrap();
    start(connection);
    let mut send = send.ready().await.unwrap();
    // Several, so that the library's encoder uses its table and its Huffman code.
    for _ in 0..5 {
        let request = http::Request::builder()
            .method(Method::CONNECT)
            .uri("10.0.0.1:80")
            .header("forwarded", "for=10.1.2.3")
            .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
            .body(())
            .unwrap();
        let (response, mut body) = send.send_request(request, false).unwrap();
        let response = soon(response).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let sent = Bytes::from(vec![9; 40_000]);
        body.send_data(sent.clone(), true).unwrap();
        let mut back = Vec::new();
        let mut stream = response.into_body();
        while let Some(chunk) = soon(stream.data()).await {
            let chunk = chunk.unwrap();
            stream.flow_control().release_capacity(chunk.len()).unwrap();
            back.extend_from_slice(&chunk);
        }
        assert!(back == sent);
        send = send.ready().await.unwrap();
    }
    drop(send);
    serving.end().await;
}

#[tokio::test]
async fn a_server_of_the_library_serves() {
    let (client, server) = sockets().await;
    let acceptor = TlsAcceptor::from(CONFIGS.server.clone());
    let ((socket, tls), server) = tokio::join!(dialled(client), acceptor.accept(server));
    let server = server.unwrap();
    let serving = start(async move {
        let mut connection = h2::server::handshake(server).await.unwrap();
        while let Some(request) = connection.accept().await {
            let (request, mut respond) = request.unwrap();
            assert_eq!(request.method(), Method::CONNECT);
            assert_eq!(request.uri().authority().unwrap().as_str(), "10.0.0.1:80");
            let mut send = respond.send_response(http::Response::new(()), false).unwrap();
            let mut body = request.into_body();
            start(async move {
                while let Some(chunk) = body.data().await {
                    let Ok(chunk) = chunk else { return };
                    body.flow_control().release_capacity(chunk.len()).unwrap();
                    send.send_data(chunk, false).unwrap();
                }
                send.send_data(Bytes::new(), true).unwrap();
            });
        }
    });
    let (opener, _control, connection) = Connection::client(socket, tls, SETTINGS);
    let driven = start(connection);
    for _ in 0..5 {
        let opening = opener.open(authority(), &headers()).unwrap();
        let (status, mut stream) = soon(opening.answer()).await.unwrap();
        assert_eq!(status, StatusCode::OK);
        let sent = vec![3; 30_000];
        stream.write_all(&sent).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut back = Vec::new();
        soon(stream.read_to_end(&mut back)).await.unwrap();
        assert!(back == sent);
    }
    drop(opener);
    assert_eq!(driven.end().await, Ok(()));
    serving.end().await;
}
